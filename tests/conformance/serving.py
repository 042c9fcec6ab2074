"""A server under test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.test_utils import TestServer

from backends.loading import PolicyConfig, open_policy
from backends.server import make_app
from conformance.responses import Server


@asynccontextmanager
async def served(config: PolicyConfig, *, seeded: bool) -> AsyncIterator[Server]:
    """Serve a policy on loopback."""
    async with (
        open_policy(config) as policy,
        TestServer(make_app(policy), handler_cancellation=True) as server,
        aiohttp.ClientSession() as session,
    ):
        yield Server(str(server.make_url("/v1")), session, seeded=seeded)
