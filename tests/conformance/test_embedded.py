"""The embedded engine's server keeps every promise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backends.loading import PolicyConfig
from conformance import responses, surfaces
from conformance.responses import Check, Server
from conformance.serving import served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(tiny_policy: Path) -> AsyncIterator[Server]:
    config = PolicyConfig(model=str(tiny_policy), context_length=1024)
    async with served(config, seeded=True) as server:
        yield server


@pytest.mark.parametrize("check", responses.CHECKS, ids=lambda check: check.__name__)
async def test_responses(server: Server, check: Check) -> None:
    await check(server)


@pytest.mark.parametrize("check", surfaces.CHECKS, ids=lambda check: check.__name__)
async def test_other_surfaces(server: Server, check: Check) -> None:
    await check(server)
