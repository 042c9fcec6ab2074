"""The server over the real SGLang keeps every promise that the embedded engine's keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from conformance import responses, surfaces
from conformance.responses import Check, Server
from conformance.serving import served

from backends.loading import PolicyConfig
from backends.sglang import SGLangOptions, SGLangProcess

pytestmark = [pytest.mark.sglang, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def server(sglang: SGLangProcess, tiny_policy: Path) -> AsyncIterator[Server]:
    options = SGLangOptions(urls=(sglang.url,))
    config = PolicyConfig(model=str(tiny_policy), backend="sglang", sglang=options)
    async with served(config, seeded=False) as server:
        yield server


@pytest.mark.parametrize("check", responses.CHECKS, ids=lambda check: check.__name__)
async def test_responses(server: Server, check: Check) -> None:
    await check(server)


@pytest.mark.parametrize("check", surfaces.CHECKS, ids=lambda check: check.__name__)
async def test_other_surfaces(server: Server, check: Check) -> None:
    await check(server)
