"""The engine over a running SGLang server, and the launching of one."""

from backends.sglang.config import SGLangConfig
from backends.sglang.engine import SGLangEngine
from backends.sglang.launch import CPU_ARGUMENTS, SGLangProcess, launch_sglang
from backends.sglang.opening import SGLangOptions, open_sglang

__all__ = [
    "CPU_ARGUMENTS",
    "SGLangConfig",
    "SGLangEngine",
    "SGLangOptions",
    "SGLangProcess",
    "launch_sglang",
    "open_sglang",
]
