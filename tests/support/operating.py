"""A server on loopback as it is operated: its own socket, with keys and limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from backends.policy import Policy
from backends.server import make_app
from backends.server.operation import AccessConfig, OperationConfig, RequestLimits, serving

ASK = {"input": "1 + 2 =", "max_output_tokens": 4}
"""The body of a model call."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: Any = field(repr=False)

    @property
    def code(self) -> str | None:
        code: str | None = self.body["error"]["code"]
        return code


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    app: web.Application
    port: int
    _connections: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        """Send one request on a connection of its own."""
        async with aiohttp.ClientSession() as session:
            async with session.request(method, self.url + path, **options) as answer:
                data = await answer.read()
                is_json = answer.content_type == "application/json" and data
                headers = {name.lower(): value for name, value in answer.headers.items()}
                return Answer(answer.status, headers, await answer.json() if is_json else data)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a bare connection, which `close` closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._connections.append(writer)
        return reader, writer

    async def close(self) -> None:
        """Close what `connect` opened."""
        for writer in self._connections:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def operated(
    policy: Policy, *, access: AccessConfig | None = None, limits: RequestLimits | None = None
) -> AsyncIterator[Server]:
    """Serve a policy."""
    config = OperationConfig(access or AccessConfig(), limits or RequestLimits())
    app = make_app(policy, operation=config)
    async with serving(app, "127.0.0.1", 0, config.limits) as port:
        server = Server(app, port)
        try:
            yield server
        finally:
            await server.close()
