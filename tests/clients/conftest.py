"""The tiny policy on loopback, for clients that block, too; and policies that say what they are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from conformance.serving import served
from support.capturing import Serve, renderer, serve
from support.chatting import StepEngine
from support.clients import Scripted

from backends.loading import PolicyConfig
from backends.rendering import TemplateRenderer

__all__ = ["policy_url", "renderer", "scripted", "serve"]


@pytest.fixture(scope="package")
def policy_url(tiny_policy: Path) -> Iterator[str]:
    """The real policy; its server has a thread of its own, so that a client that blocks does not block it."""
    config = PolicyConfig(model=str(tiny_policy), context_length=1024)
    with start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(served(config, seeded=True)) as server:
            yield server.url


@pytest.fixture
def scripted(serve: Serve, renderer: TemplateRenderer) -> Scripted:
    async def start(says: Sequence[str]) -> str:
        return await serve(engine=StepEngine([renderer.encode(text) for text in says]))

    return start
