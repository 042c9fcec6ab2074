"""Fixtures: a server on loopback whose policy says what it is told. Import them where they are needed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeAlias

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer

from backends.engine import Engine
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from backends.server.capture import CaptureLimits
from support.replay import ReplayEngine

Serve: TypeAlias = Callable[..., Awaitable[str]]
"""Serves a policy that says given things in turn; returns its base URL."""


@pytest.fixture(scope="session")
def renderer(untrained_policy: Path) -> TemplateRenderer:
    return TemplateRenderer.from_folder(untrained_policy)


@pytest_asyncio.fixture
async def serve(renderer: TemplateRenderer) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(
            says: Sequence[str] = (),
            *,
            engine: Engine | None = None,
            captures: CaptureLimits | None = None,
            keep_alive_s: float = 15.0,
        ) -> str:
            engine = engine or ReplayEngine([renderer.encode(text) for text in says])
            app = make_app(Policy(engine, renderer), captures=captures, keep_alive_s=keep_alive_s)
            server = await stack.enter_async_context(TestServer(app, handler_cancellation=True))
            return str(server.make_url("/v1"))

        yield start
