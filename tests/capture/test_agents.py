"""Unmodified agents, captured: what comes out is a rollout like any other."""

from __future__ import annotations

import pytest
from support.agents import AGENTS, call_text, say_text
from support.capturing import Serve

from gym_sdk import GymClient, Outcome, Rollout, Task

pytestmark = pytest.mark.asyncio

SAYS = [call_text("1 + 2"), call_text("3+4"), say_text("It is 7.")]


async def correct(rollout: Rollout) -> float:
    return float(str(rollout.task.answer) in rollout.output_text)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ["responses", "chat"])
async def test_a_bare_loop_is_one_sequence(serve: Serve, route: str, stream: bool) -> None:
    url = await serve(SAYS)
    async with GymClient(url, model="policy") as client:
        async with client.capture(Task("What is 1 + 2 + 4?", answer=7, id="sum")) as session:
            assert session.base_url.endswith("/v1")
            said = await AGENTS[route](session.openai(), "What is 1 + 2 + 4?", stream=stream)
            rollout = await session.finish(verifier=correct, metrics={"tool_errors": 0})
    assert said == "It is 7."
    assert (rollout.outcome, rollout.reward, rollout.failure) == (Outcome.COMPLETED, 1.0, None)
    assert [item.type for item in rollout.items] == [
        "message",
        *["function_call", "function_call_output"] * 2,
        "message",
    ]
    assert rollout.input_items == 1
    assert [(call.first_item, call.end_item) for call in rollout.model_calls] == [(1, 2), (3, 4), (5, 6)]
    assert rollout.output_text == "It is 7."
    assert [call.arguments for call in rollout.function_calls] == [
        '{"expression": "1 + 2"}',
        '{"expression": "3+4"}',
    ]
    assert all(item.tokens is None for item in rollout.items)
    assert rollout.metrics == {"turns": 3, "tool_calls": 2, "tool_errors": 0}
    (row,) = rollout.sequences()
    assert row.trained_tokens == sum(
        len(call.tokens.generation_token_ids) for call in rollout.model_calls if call.tokens
    )
    assert rollout.timing.model_s > 0
    assert rollout.id == session.rollout_id == rollout.sequences()[0].rollout_id
    assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout
