"""The OpenAI Agents SDK, unmodified, with the server's own address and with that of a capture.

Either way, a conversation is one sequence of tokens, which no turn forks.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from support.agents import calculate, call_text, say_text
from support.capturing import Serve
from support.clients import (
    ANSWER,
    ANSWERS,
    QUESTION,
    THINKS,
    TURNS,
    Answer,
    Scripted,
    named_call,
    policy_stats,
)
from support.held import HeldEngine, until

from gym_sdk import GymClient, Task

os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
agents: Any = import_module("agents")

pytestmark = pytest.mark.asyncio

THANKS = THINKS + say_text("You are welcome.")
MODELS = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}

routes = pytest.mark.parametrize("route", MODELS)
places = pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
streams = pytest.mark.parametrize("stream", [False, True], ids=["run", "run_streamed"])


@agents.function_tool
def calculator(expression: str) -> str:
    """Evaluate an expression."""
    return calculate(f'{{"expression": "{expression}"}}')


@asynccontextmanager
async def playing(
    scripted: Scripted, says: Sequence[str], route: str, *, captured: bool
) -> AsyncIterator[Any]:
    """Yield a model that says these things; assert that they were one conversation, exact to the token."""
    url = await scripted(says)
    if captured:
        async with GymClient(url, model="policy") as client, client.capture(Task(QUESTION)) as session:
            yield MODELS[route](model=session.model, openai_client=session.openai(max_retries=0))
            rollout = await session.finish()
        assert rollout.metrics["turns"] == len(says)
        assert len(rollout.sequences()) == 1
    else:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as openai_client:
            yield MODELS[route](model="policy", openai_client=openai_client)
    stats = await policy_stats(url)
    assert (stats["responses"], stats["forks"]) == (len(says), 0)
    assert stats["bridges"] + stats["splices"] == len(says) - 1


def agent_of(model: Any, **fields: Any) -> Any:
    given = {"name": "calculating", "instructions": "Use the calculator.", "tools": [calculator], **fields}
    return agents.Agent(model=model, **given)


async def run(agent: Any, asked: Any, *, stream: bool, **options: Any) -> Any:
    """Run an agent to its end."""
    if not stream:
        return await agents.Runner.run(agent, asked, **options)
    result = agents.Runner.run_streamed(agent, asked, **options)
    async for _ in result.stream_events():
        pass
    return result


@places
@routes
async def test_tools(scripted: Scripted, route: str, captured: bool) -> None:
    async with playing(scripted, TURNS, route, captured=captured) as model:
        result = await agents.Runner.run(agent_of(model), QUESTION)
    assert result.final_output.strip() == "It is 7."
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs == ["3", "7"]
    usage = result.context_wrapper.usage
    assert usage.requests == 3
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > usage.output_tokens > 0


@places
@routes
async def test_the_events_of_a_stream(scripted: Scripted, route: str, captured: bool) -> None:
    async with playing(scripted, TURNS, route, captured=captured) as model:
        result = agents.Runner.run_streamed(agent_of(model), QUESTION)
        events = [event async for event in result.stream_events()]
    raw = [event.data for event in events if event.type == "raw_response_event"]
    deltas = [data.delta for data in raw if data.type == "response.output_text.delta"]
    assert "".join(deltas).strip() == result.final_output.strip() == "It is 7."
    steps = [event.name for event in events if event.type == "run_item_stream_event"]
    assert steps == [
        *["reasoning_item_created", "tool_called", "tool_output"] * 2,
        *["reasoning_item_created", "message_output_created"],
    ]


@places
@routes
@streams
async def test_an_output_type(scripted: Scripted, route: str, captured: bool, stream: bool) -> None:
    async with playing(scripted, [call_text("1 + 2"), ANSWERS], route, captured=captured) as model:
        result = await run(agent_of(model, output_type=Answer), QUESTION, stream=stream)
    assert result.final_output == ANSWER


@routes
@streams
async def test_an_output_type_of_the_real_policy(policy_url: str, route: str, stream: bool) -> None:
    async with AsyncOpenAI(base_url=policy_url, api_key="none", max_retries=0) as client:
        model = MODELS[route](model="policy", openai_client=client)
        result = await run(agent_of(model, tools=[], output_type=Answer), QUESTION, stream=stream)
    assert isinstance(result.final_output, Answer)


@places
@routes
@streams
async def test_a_session(scripted: Scripted, route: str, captured: bool, stream: bool) -> None:
    session = agents.SQLiteSession("conversation")
    async with playing(scripted, [*TURNS, THANKS], route, captured=captured) as model:
        agent = agent_of(model)
        first = await run(agent, QUESTION, stream=stream, session=session)
        second = await run(agent, "Thank you.", stream=stream, session=session)
    session.close()
    assert first.final_output.strip() == "It is 7."
    assert second.final_output.strip() == "You are welcome."


@places
@routes
async def test_a_history_that_goes_on(scripted: Scripted, route: str, captured: bool) -> None:
    async with playing(scripted, [*TURNS, THANKS], route, captured=captured) as model:
        first = await run(agent_of(model), QUESTION, stream=False)
        history = [*first.to_input_list(), {"role": "user", "content": "Thank you."}]
        second = await run(agent_of(model), history, stream=True)
    assert second.final_output.strip() == "You are welcome."


@places
@streams
async def test_previous_response_ids(scripted: Scripted, captured: bool, stream: bool) -> None:
    async with playing(scripted, [*TURNS, THANKS], "responses", captured=captured) as model:
        agent = agent_of(model)
        first = await run(agent, QUESTION, stream=stream, auto_previous_response_id=True)
        last = {"previous_response_id": first.last_response_id}
        second = await run(agent, "Thank you.", stream=stream, **last)
    assert first.final_output.strip() == "It is 7."
    assert second.final_output.strip() == "You are welcome."


@places
@streams
async def test_nothing_is_kept_and_thinking_is_sealed(
    scripted: Scripted, captured: bool, stream: bool
) -> None:
    settings = agents.ModelSettings(
        store=False,
        response_include=["reasoning.encrypted_content"],
        reasoning=Reasoning(effort="low", summary="auto"),
        truncation="auto",
        parallel_tool_calls=False,
    )
    async with playing(scripted, TURNS, "responses", captured=captured) as model:
        result = await run(agent_of(model, model_settings=settings), QUESTION, stream=stream)
    assert result.final_output.strip() == "It is 7."
    thoughts = [item.raw_item for item in result.new_items if item.type == "reasoning_item"]
    assert len(thoughts) == 3
    assert all(thought.encrypted_content for thought in thoughts)


@places
@streams
async def test_a_custom_tool(scripted: Scripted, captured: bool, stream: bool) -> None:
    commands = []

    async def shell(_context: Any, command: str) -> str:
        commands.append(command)
        return "a b"

    says = [THINKS + named_call("shell", input="ls -l"), THINKS + say_text("Two files.")]
    async with playing(scripted, says, "responses", captured=captured) as model:
        tool = agents.CustomTool("shell", "Run a command.", shell, format={"type": "text"})
        result = await run(agent_of(model, tools=[tool]), "What is here?", stream=stream)
    assert result.final_output.strip() == "Two files."
    assert commands == ["ls -l"]


@routes
@streams
async def test_a_handoff(scripted: Scripted, route: str, stream: bool) -> None:
    url = await scripted([named_call("transfer_to_expert"), call_text("1 + 2"), say_text("It is 3.")])
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        model = MODELS[route](model="policy", openai_client=client)
        expert = agent_of(model, name="expert", instructions="You know.")
        result = await run(agent_of(model, tools=[], handoffs=[expert]), QUESTION, stream=stream)
    assert (result.final_output, result.last_agent.name) == ("It is 3.", "expert")


@routes
@streams
async def test_an_agent_as_a_tool(scripted: Scripted, route: str, stream: bool) -> None:
    url = await scripted([named_call("ask", input="1 + 2?"), say_text("3"), say_text("It is 3.")])
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        model = MODELS[route](model="policy", openai_client=client)
        expert = agent_of(model, name="expert").as_tool("ask", "Ask the expert.")
        result = await run(agent_of(model, tools=[expert]), QUESTION, stream=stream)
    assert result.final_output == "It is 3."
    assert [item.output for item in result.new_items if item.type == "tool_call_output_item"] == ["3"]


@routes
async def test_a_model_that_is_named(scripted: Scripted, route: str) -> None:
    async with AsyncOpenAI(base_url=await scripted(TURNS), api_key="none", max_retries=0) as client:
        provider = agents.OpenAIProvider(openai_client=client, use_responses=route == "responses")
        config = agents.RunConfig(model_provider=provider)
        result = await run(agent_of("policy"), QUESTION, stream=False, run_config=config)
    assert result.final_output.strip() == "It is 7."


@routes
async def test_a_guardrail_that_trips_ends_the_generation(serve: Serve, route: str) -> None:
    engine = HeldEngine([])

    @agents.input_guardrail
    async def closed(*_: Any) -> Any:
        await engine.started.wait()
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    async with AsyncOpenAI(base_url=await serve(engine=engine), api_key="none", max_retries=0) as client:
        agent = agent_of(MODELS[route](model="policy", openai_client=client), input_guardrails=[closed])
        with pytest.raises(agents.InputGuardrailTripwireTriggered):
            await run(agent, QUESTION, stream=False)
        await until(lambda: engine.cancelled == 1)
    assert engine.running == 0
