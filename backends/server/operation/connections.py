"""The listening socket: how many connections there may be."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiohttp import web
from pydantic_core import to_json

from backends.server.operation.config import RequestLimits
from gym_sdk.errors import ConfigurationError

__all__ = ["serving"]

_log = logging.getLogger(__name__)

_CLOSE_S = 1.0
"""How long requests may take to end when the context is left."""

_OTHER_FILES = 256
"""About how many files a server has open besides its connections."""


@asynccontextmanager
async def serving(app: web.Application, host: str, port: int, limits: RequestLimits) -> AsyncIterator[int]:
    """Serve an application until the context is left; yield the port. What is in flight then is cut off.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    _allow_files(limits.max_connections + _OTHER_FILES)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=limits.idle_s,
        shutdown_timeout=_CLOSE_S,
    )
    try:
        await runner.setup()
        assert runner.server is not None
        listener = await _listen(runner.server, host, port, limits)
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()
    finally:
        await runner.cleanup()


async def _listen(server: web.Server, host: str, port: int, limits: RequestLimits) -> asyncio.Server:
    full = _full(limits)

    def connect() -> asyncio.Protocol:
        # a list of them all, but only for a connection that is new
        return server() if len(server.connections) < limits.max_connections else _Refusing(full)

    try:
        return await asyncio.get_running_loop().create_server(connect, host, port, backlog=4096)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error}") from error


class _Refusing(asyncio.Protocol):
    """Tells a client that there are too many connections, and closes its own."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._answer)
        transport.close()


def _full(limits: RequestLimits) -> bytes:
    body = to_json(
        {
            "error": {
                "message": f"the server has {limits.max_connections} connections, the most that it takes",
                "type": "server_error",
                "param": None,
                "code": "too_many_connections",
            }
        }
    )
    head = [
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {math.ceil(limits.retry_after_s)}",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def _allow_files(count: int) -> None:
    """Let this process have that many files open, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems refuse what they say is allowed
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < count:
        _log.warning(
            "only %d files may be open at once (ulimit -Hn): connections beyond that must wait", soft
        )
