"""A real tiny policy behind a real server, and what a client reads of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio
from aiohttp.test_utils import TestServer

from backends.engine import GenerationChunk, GenerationRequest
from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.server import make_app
from support.replay import ReplayEngine


class StepEngine(ReplayEngine):
    """Replays generations token by token, with time for a look at each."""

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        generation = await self.generate(request)
        last = len(generation.token_ids) - 1
        for place, token_id in enumerate(generation.token_ids):
            await asyncio.sleep(0.001)
            reason = generation.finish_reason if place == last else None
            yield GenerationChunk([token_id], [generation.log_probs[place]], "0", reason)


@pytest_asyncio.fixture
async def chat_policy(untrained_policy: Path) -> AsyncIterator[Policy]:
    policy = load_policy(PolicyConfig(model=str(untrained_policy), context_length=512))
    yield policy
    await policy.aclose()


@pytest_asyncio.fixture
async def chat_url(chat_policy: Policy) -> AsyncIterator[str]:
    async with TestServer(make_app(chat_policy), handler_cancellation=True) as server:
        yield str(server.make_url("/v1"))


async def post(url: str, body: Any) -> tuple[int, Any]:
    """Return the status and the JSON of an answer."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        return answer.status, await answer.json()


async def error_of(url: str, body: Any) -> dict[str, Any]:
    """Return the error object of a request that is refused with 400."""
    status, answer = await post(url, body)
    assert status == 400, answer
    error: dict[str, Any] = answer["error"]
    return error


async def chunks_of(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which has to end as it should."""
    async with aiohttp.ClientSession() as session, session.post(url, json={**body, "stream": True}) as answer:
        text = await answer.text()
    assert answer.status == 200, text
    blocks = [block for block in text.removesuffix("\n\n").split("\n\n") if not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]
