"""An engine over SGLang for as long as a context lasts: one that runs already, or one launched for it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from backends.sglang.config import SGLangConfig
from backends.sglang.engine import SGLangEngine
from backends.sglang.launch import launch_sglang
from gym_sdk.errors import ConfigurationError

__all__ = ["SGLangOptions", "open_sglang"]


@dataclass(frozen=True, slots=True)
class SGLangOptions:
    """Which SGLang generates.

    Raises:
        ConfigurationError: arguments are given for an SGLang that runs already.
    """

    url: str | None = None
    """Root of one that runs already; by default one is launched."""
    api_key: str | None = None
    """Its `--admin-api-key` or `--api-key`."""
    python: str | Path = sys.executable
    """Interpreter of an environment with SGLang, to launch one."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `sglang.launch_server`."""
    log: str | Path | None = None
    """File for its output; by default one that goes with it."""
    start_s: float = 600.0
    """Deadline for it to answer."""
    config: SGLangConfig = field(default_factory=SGLangConfig)
    """Deadlines of requests."""

    def __post_init__(self) -> None:
        if self.url is not None and self.arguments:
            raise ConfigurationError("arguments are for an SGLang that is launched, not for one at a URL")


@asynccontextmanager
async def open_sglang(model: str | Path, options: SGLangOptions | None = None) -> AsyncIterator[SGLangEngine]:
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
        url, diagnose = options.url, None
        if url is None:
            process = await stack.enter_async_context(
                launch_sglang(
                    model,
                    python=options.python,
                    arguments=options.arguments,
                    log=options.log,
                    start_s=options.start_s,
                )
            )
            url, diagnose = process.url, process.diagnosis
        engine = await SGLangEngine.connect(
            url, model=model, api_key=options.api_key, config=options.config, diagnose=diagnose
        )
        yield await stack.enter_async_context(engine)
