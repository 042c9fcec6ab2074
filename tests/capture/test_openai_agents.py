"""The OpenAI Agents SDK, unmodified, against a captured policy."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest
from support.agents import calculate, call_text, say_text
from support.capturing import Serve

from gym_sdk import GymClient, Outcome, Rollout, Task
from gym_sdk.capture import CaptureSession
from gym_sdk.schema import Truncation

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
agents: Any = import_module("agents")

pytestmark = pytest.mark.asyncio

QUESTION = "What is 1 + 2 + 4?"
SAYS = [call_text("1 + 2"), call_text("3+4"), say_text("It is 7.")]
MODELS = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}


@agents.function_tool
def calculator(expression: str) -> str:
    """Evaluate an expression."""
    return calculate(f'{{"expression": "{expression}"}}')


async def run(agent: Any, *, stream: bool, turns: int = 8) -> str:
    if not stream:
        return str((await agents.Runner.run(agent, QUESTION, max_turns=turns)).final_output)
    result = agents.Runner.run_streamed(agent, QUESTION, max_turns=turns)
    async for _ in result.stream_events():
        pass
    return str(result.final_output)


def agent_of(session: CaptureSession, route: str, **fields: Any) -> Any:
    return agents.Agent(
        name="calculating",
        instructions="Use the calculator.",
        tools=[calculator],
        model=MODELS[route](model=session.model, openai_client=session.openai()),
        **fields,
    )


def correct(rollout: Rollout) -> bool:
    return str(rollout.task.answer) in rollout.output_text


@pytest.mark.parametrize("stream", [False, True], ids=["run", "run_streamed"])
@pytest.mark.parametrize("route", ["responses", "chat"])
async def test_turns_with_tools_are_one_sequence(serve: Serve, route: str, stream: bool) -> None:
    async with GymClient(await serve(SAYS), model="policy") as client:
        async with client.capture(Task(QUESTION, answer=7)) as session:
            said = await run(agent_of(session, route), stream=stream)
            rollout = await session.finish(verifier=correct)
    assert said == "It is 7."
    assert (rollout.outcome, rollout.reward, rollout.failure) == (Outcome.COMPLETED, 1.0, None)
    assert [item.type for item in rollout.items] == [
        *["message"] * 2,
        *["function_call", "function_call_output"] * 2,
        "message",
    ]
    assert rollout.input_items == 2
    assert len(rollout.sequences()) == 1
    assert rollout.metrics == {"turns": 3, "tool_calls": 2}
    assert [call.route for call in session.calls] == ["chat/completions" if route == "chat" else route] * 3


@pytest.mark.parametrize("route", ["responses", "chat"])
async def test_a_handoff_is_a_second_sequence_of_one_conversation(serve: Serve, route: str) -> None:
    handoff = '<tool_call>\n{"name": "transfer_to_expert", "arguments": {}}\n</tool_call><|im_end|>'
    url = await serve([handoff, call_text("1 + 2"), say_text("It is 3.")])
    async with GymClient(url, model="policy") as client, client.capture(Task(QUESTION)) as session:
        expert = agent_of(session, route).clone(name="expert", instructions="You know.")
        first = agent_of(session, route).clone(tools=[], handoffs=[expert])
        said = await run(first, stream=False)
        rollout = await session.finish()
    assert said == "It is 3."
    assert [getattr(item, "role", item.type) for item in rollout.items] == [
        *("system", "user", "function_call"),
        *("system", "function_call_output", "function_call", "function_call_output", "assistant"),
    ]
    assert rollout.items[3].text == "You know."  # type: ignore[union-attr]
    assert len(rollout.sequences()) == 2
    assert rollout.metrics["forks"] == 1


async def test_an_agent_out_of_turns_is_truncated(serve: Serve) -> None:
    async with (
        GymClient(await serve(SAYS), model="policy") as client,
        client.capture(Task(QUESTION)) as session,
    ):
        with pytest.raises(agents.MaxTurnsExceeded):
            await run(agent_of(session, "responses"), stream=False, turns=1)
        rollout = await session.finish(verifier=correct, truncation=Truncation.TURNS)
    assert (rollout.outcome, rollout.truncation) == (Outcome.TRUNCATED, Truncation.TURNS)


@pytest.mark.parametrize("stream", [False, True], ids=["run", "run_streamed"])
async def test_a_cut_answer_is_truncated_although_the_sdk_may_raise(serve: Serve, stream: bool) -> None:
    url = await serve(["and so"])
    async with GymClient(url, model="policy") as client, client.capture(Task(QUESTION)) as session:
        with suppress(agents.AgentsException):
            await run(agent_of(session, "responses"), stream=stream)
        rollout = await session.finish(verifier=correct)
    assert rollout.outcome is Outcome.TRUNCATED
    assert rollout.reward == 0.0
