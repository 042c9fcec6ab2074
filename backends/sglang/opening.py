"""An engine over SGLang for as long as a context lasts: over running ones, or one launched for it."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from backends.sglang.config import FleetConfig, SGLangConfig
from backends.sglang.fleet.fleet import SGLangFleet
from backends.sglang.launch import launch_sglang
from gym_sdk.errors import ConfigurationError

__all__ = ["PYTHON", "SGLangOptions", "open_sglang"]

PYTHON = "GYM_SDK_SGLANG_PYTHON"
"""The environment variable that names an interpreter with SGLang."""


@dataclass(frozen=True, slots=True)
class SGLangOptions:
    """Which SGLang generates.

    Raises:
        ConfigurationError: arguments are given for an SGLang that runs already.
    """

    urls: tuple[str, ...] = ()
    """Roots of those that run already, or of an sglang-router; by default one is launched."""
    api_key: str | None = None
    """Their `--admin-api-key` or `--api-key`."""
    python: str | Path | None = None
    """Interpreter of an environment with SGLang, to launch one; by default the one that the environment
    variable GYM_SDK_SGLANG_PYTHON names, else this one."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `sglang.launch_server`."""
    log: str | Path | None = None
    """File for its output; by default one that goes with it."""
    start_s: float = 600.0
    """Deadline for it to answer."""
    restarts: int = 3
    """How often in a row one that was launched is started again when it ends by itself."""
    config: SGLangConfig = field(default_factory=SGLangConfig)
    """Deadlines of requests."""
    watch: FleetConfig = field(default_factory=FleetConfig)
    """How they are watched."""

    def __post_init__(self) -> None:
        if self.urls and self.arguments:
            raise ConfigurationError("arguments are for an SGLang that is launched, not for one at a URL")
        if self.restarts < 0:
            raise ConfigurationError(f"restarts must not be negative, not {self.restarts}")


@asynccontextmanager
async def open_sglang(model: str | Path, options: SGLangOptions | None = None) -> AsyncIterator[SGLangFleet]:
    """Connect to SGLang, launching it first unless the options name one; yield the engine.

    Args:
        model: folder of the model.
        options: which SGLang.

    Raises:
        ConfigurationError: it cannot be launched, serves another model, or cannot keep the token contract.
        TransportError: it does not answer, or ended before it did.
        DeadlineError: it did not answer in time.
    """
    options = options or SGLangOptions()
    async with AsyncExitStack() as stack:
        urls, processes = options.urls, {}
        if not urls:
            process = await stack.enter_async_context(
                launch_sglang(
                    model,
                    python=options.python or os.environ.get(PYTHON) or sys.executable,
                    arguments=options.arguments,
                    log=options.log,
                    start_s=options.start_s,
                    restarts=options.restarts,
                )
            )
            urls, processes = (process.url,), {process.url: process}
        fleet = await SGLangFleet.connect(
            urls,
            model=model,
            api_key=options.api_key,
            config=options.config,
            watch=options.watch,
            processes=processes,
        )
        yield await stack.enter_async_context(fleet)
