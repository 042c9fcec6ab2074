"""The engine over a running SGLang server, and the launching of one."""

from backends.sglang.config import FleetConfig, SGLangConfig
from backends.sglang.engine import SGLangEngine
from backends.sglang.fleet.fleet import SGLangFleet
from backends.sglang.launch import CPU_ARGUMENTS, launch_sglang
from backends.sglang.opening import SGLangOptions, open_sglang
from backends.sglang.process import SGLangProcess

__all__ = [
    "CPU_ARGUMENTS",
    "FleetConfig",
    "SGLangConfig",
    "SGLangEngine",
    "SGLangFleet",
    "SGLangOptions",
    "SGLangProcess",
    "launch_sglang",
    "open_sglang",
]
