"""A judge's server on a real socket, which answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Script = Callable[[dict[str, Any]], Any]
"""From a request's body to the judge's text; or to a (status, body, headers); or "drop"; or an awaitable."""


class JudgeServer:
    """Speaks both APIs. Counts what is open, so that a test sees what a judge left behind."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.running = 0
        self.most_running = 0
        self.transports: set[asyncio.BaseTransport] = set()
        self.connections = 0
        self.cut = False
        self.url = ""

    @property
    def open_connections(self) -> int:
        return sum(not transport.is_closing() for transport in self.transports)

    async def all_closed(self) -> None:
        """Wait until the judge has closed its connections; the server hears of it a moment later."""
        async with asyncio.timeout(10):
            while self.open_connections:
                await asyncio.sleep(0.005)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.connections += request.transport not in self.transports
        self.transports.add(request.transport)
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer = self.script(body)
            if isinstance(answer, Awaitable):
                answer = await answer
        finally:
            self.running -= 1
        if answer == "drop":
            request.transport.close()
            return web.Response()
        if isinstance(answer, tuple):
            status, data, headers = answer
            return web.Response(status=status, body=data, headers=headers)
        wire = self._chat(answer) if request.path.endswith("completions") else self._response(answer)
        return web.json_response(wire)

    def _chat(self, text: str) -> dict[str, Any]:
        return {
            "choices": [
                {
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "length" if self.cut else "stop",
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        }

    def _response(self, text: str) -> dict[str, Any]:
        return {
            "id": "resp_1",
            "status": "incomplete" if self.cut else "completed",
            "output": [
                {"type": "reasoning", "summary": []},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": text, "annotations": []}],
                },
            ],
            "usage": {"input_tokens": 10, "output_tokens": 2},
        }


@asynccontextmanager
async def judge_server(script: Script, *, port: int | None = None) -> AsyncIterator[JudgeServer]:
    """Serve for as long as the context lasts."""
    served = JudgeServer(script)
    app = web.Application()
    for path in ("/v1/responses", "/v1/chat/completions"):
        app.router.add_post(path, served.handle)
    async with TestServer(app, port=port) as server:
        served.url = str(server.make_url("/v1"))
        yield served


def in_turn(*answers: Any) -> Script:
    """Return a script that gives these answers one after the other."""
    queue = iter(answers)
    return lambda body: next(queue)
