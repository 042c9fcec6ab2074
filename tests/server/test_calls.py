"""Model calls behind one request: what their failures and their news become."""

from __future__ import annotations

import gc

import pytest
from support.operating import ASK, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer

pytestmark = pytest.mark.asyncio


@pytest.fixture
def policy(renderer: TemplateRenderer) -> Policy:
    return Policy(ReplayEngine([renderer.encode("three")] * 8), renderer)


@pytest.mark.parametrize("streams", [False, True])
async def test_where_all_choices_fail_one_is_told_and_none_is_logged(
    policy: Policy, streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": ["a", "b", "c"], "model": "another", "stream": streams}
    async with operated(policy) as server:
        answer = await server.ask("POST", "/v1/completions", json=body)
        assert (answer.status, answer.code) == (404, "model_not_found")
        gc.collect()  # which is when asyncio complains of errors that nobody took
    assert not caplog.records


async def test_a_stream_with_news_says_nothing_else(policy: Policy) -> None:
    async with operated(policy) as server:
        answer = await server.ask("POST", "/v1/responses", json={**ASK, "stream": True})
    blocks = answer.body.removesuffix(b"\n\n").split(b"\n\n")
    assert blocks.pop() == b"data: [DONE]"
    assert all(block.startswith(b"event: ") for block in blocks)
