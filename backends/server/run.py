"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from backends.loading import PolicyConfig, open_policy
from backends.policy import Policy
from backends.server.app import make_app
from backends.server.capture import CaptureLimits
from backends.server.operation import TRAFFIC, OperationConfig, serving
from backends.server.state import MemoryStore, ResponseStore, SqliteStore, StateLimits
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import TokenForm

__all__ = ["ServerConfig", "serve"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where to serve, and how.

    Raises:
        ConfigurationError: the address can be reached from other machines, and there is no key.
    """

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    drain_s: float = 10.0
    """How long requests in flight may take to finish after SIGTERM; a second signal ends them at once."""
    token_form: TokenForm = "item"
    """Where responses carry their tokens, unless a request's header says otherwise."""
    captures: CaptureLimits = field(default_factory=CaptureLimits)
    """How much is kept of captured rollouts, and for how long."""
    state: StateLimits = field(default_factory=StateLimits)
    """How many responses are kept, and for how long."""
    state_file: Path | None = None
    """SQLite file to keep them in, so that a restart finds them; by default they are kept in memory."""
    operation: OperationConfig = field(default_factory=OperationConfig)
    """Who may call, and how much the server takes on."""
    allow_unauthenticated: bool = False
    """Whether to serve other machines without any key."""
    ready_fd: int | None = None
    """File descriptor on which to write the port once the server listens (for a parent process)."""
    alive_fd: int | None = None
    """File descriptor whose end of file says that the parent process is gone: the server then stops."""

    def __post_init__(self) -> None:
        if not (self.operation.access.keys or self.allow_unauthenticated or _is_loopback(self.host)):
            raise ConfigurationError(
                f"whoever reaches {self.host or 'this host'} could use this model and replace its weights; "
                "name keys (--api-key, --admin-api-key), or say --allow-unauthenticated"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


def _store(config: ServerConfig) -> ResponseStore:
    if config.state_file is None:
        return MemoryStore(config.state)
    return SqliteStore(config.state_file, config.state)


async def _serve(policy: Policy, model: PolicyConfig, config: ServerConfig) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    app = make_app(
        policy,
        captures=config.captures,
        token_form=config.token_form,
        operation=config.operation,
        store=_store(config),
    )
    async with serving(app, config.host, config.port, config.operation.limits) as port:
        _log.info("serving %s as %r at http://%s:%d/v1", model.model, model.name, config.host, port)
        if config.ready_fd is not None:
            os.write(config.ready_fd, f"{port}\n".encode())
            os.close(config.ready_fd)
        if config.alive_fd is not None:
            loop.add_reader(config.alive_fd, stop.set)
        try:
            await stop.wait()
        finally:
            if config.alive_fd is not None:
                loop.remove_reader(config.alive_fd)
        # The socket is still open, so that whoever asks is told, by /health and by 503.
        await app[TRAFFIC].drain(config.drain_s, hurry)
