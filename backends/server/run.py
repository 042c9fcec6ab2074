"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from backends.loading import PolicyConfig, open_policy
from backends.policy import Policy
from backends.server.app import make_app
from backends.server.capture import CaptureLimits
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import TokenForm

__all__ = ["ServerConfig", "serve"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where to serve."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    drain_s: float = 10.0
    """How long requests in flight may take to finish after SIGTERM."""
    token_form: TokenForm = "item"
    """Where responses carry their tokens, unless a request's header says otherwise."""
    captures: CaptureLimits = field(default_factory=CaptureLimits)
    """How much is kept of captured rollouts, and for how long."""
    ready_fd: int | None = None
    """File descriptor on which to write the port once the server listens (for a parent process)."""
    alive_fd: int | None = None
    """File descriptor whose end of file says that the parent process is gone: the server then stops."""


async def serve(model: PolicyConfig, config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; then drain requests in flight and stop.

    Until then, Python's garbage collector leaves alone what the process held when the server started.

    Raises:
        ConfigurationError: the model cannot be loaded, or the address cannot be listened on.
    """
    async with open_policy(model) as policy:
        with _frozen():
            await _serve(policy, model, config)


@contextmanager
def _frozen() -> Iterator[None]:
    """Take what was loaded out of the garbage collector's sight.

    Some 200,000 objects of torch and transformers stay for good. To look through them all takes 0.1 s, in
    which every request stands still, and happens again every few thousand requests.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _serve(policy: Policy, model: PolicyConfig, config: ServerConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        make_app(policy, captures=config.captures, token_form=config.token_form),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=config.drain_s,
    )
    try:
        await runner.setup()
        port = await _listen(runner, config)
        _log.info("serving %s as %r at http://%s:%d/v1", model.model, model.name, config.host, port)
        if config.ready_fd is not None:
            os.write(config.ready_fd, f"{port}\n".encode())
            os.close(config.ready_fd)
        if config.alive_fd is not None:
            loop.add_reader(config.alive_fd, stop.set)
        await stop.wait()
    finally:
        if config.alive_fd is not None:
            loop.remove_reader(config.alive_fd)
        await runner.cleanup()


async def _listen(runner: web.AppRunner, config: ServerConfig) -> int:
    site = web.TCPSite(runner, config.host, config.port, backlog=4096)
    try:
        await site.start()
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    port: int = runner.addresses[0][1]
    return port
