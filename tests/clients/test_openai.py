"""The newest openai package, unmodified: what it hands to its user, and what it does to the policy."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_asyncio
from openai import (
    APIError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    OpenAI,
    RateLimitError,
    pydantic_function_tool,
)
from support.agents import CHAT_TOOL, calculate, call_text
from support.capturing import Serve
from support.clients import Answer, Calculation, Scripted, named_call
from support.held import HeldEngine, until
from support.openai_core import CHECKS, USER, Check
from support.operating import Server, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.operation import AccessConfig, RequestLimits

GREEDY: Any = {"model": "policy", "temperature": 0}


@pytest.fixture
def client(policy_url: str) -> Iterator[OpenAI]:
    """A client that blocks, of the real policy."""
    with OpenAI(base_url=policy_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.asyncio
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_core(scripted: Scripted, check: Check) -> None:
    async with AsyncOpenAI(base_url=await scripted(check.says), api_key="none", max_retries=0) as client:
        await check.play(client)


def test_the_real_policy_says_whole_and_streamed_the_same(client: OpenAI) -> None:
    whole = client.responses.create(**GREEDY, input=[USER], max_output_tokens=48)
    with client.responses.stream(**GREEDY, input=[USER], max_output_tokens=48) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert whole.output_text == final.output_text == text != ""
    chat = client.chat.completions.create(**GREEDY, messages=[USER], max_completion_tokens=48)
    chunks = client.chat.completions.create(**GREEDY, messages=[USER], max_completion_tokens=48, stream=True)
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == chat.choices[0].message.content == text


def test_the_real_policy_keeps_a_models_schema(client: OpenAI) -> None:
    response = client.responses.parse(**GREEDY, input=[USER], text_format=Answer)
    assert isinstance(response.output_parsed, Answer)
    with client.responses.stream(**GREEDY, input=[USER], text_format=Answer) as stream:
        streamed = stream.get_final_response()
    completion = client.chat.completions.parse(**GREEDY, messages=[USER], response_format=Answer)
    with client.chat.completions.stream(**GREEDY, messages=[USER], response_format=Answer) as chunks:
        final = chunks.get_final_completion()
    message, last = completion.choices[0].message, final.choices[0].message
    assert streamed.output_parsed == message.parsed == last.parsed == response.output_parsed


def test_the_real_policy_calls_the_tool_that_is_demanded(client: OpenAI) -> None:
    tool: Any = pydantic_function_tool(Calculation)
    response: Any = client.responses.parse(
        **GREEDY, input=[USER], tools=[tool], tool_choice={"type": "function", "name": "Calculation"}
    )
    assert isinstance(response.output[-1].parsed_arguments, Calculation)
    completion: Any = client.chat.completions.parse(
        **GREEDY, messages=[USER], tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = completion.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Calculation)


def test_a_completion_of_the_real_policy(client: OpenAI) -> None:
    fields: Any = {**GREEDY, "prompt": "12 + 5 =", "max_tokens": 8}
    whole = client.completions.create(**fields, n=2)
    chunks = client.completions.create(**fields, stream=True)
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert [choice.text for choice in whole.choices] == [text, text]
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 16


def test_choices_and_their_log_probs(client: OpenAI) -> None:
    fields: Any = {"messages": [USER], "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
    completion = client.chat.completions.create(**GREEDY, **fields, n=2)
    assert [choice.index for choice in completion.choices] == [0, 1]
    known = []
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        # greedy: what was sampled is the likeliest
        assert all(entry.top_logprobs[0].token == entry.token for entry in choice.logprobs.content)
        known.append([entry.token for entry in choice.logprobs.content])
    response: Any = client.responses.create(
        **GREEDY,
        input=[USER],
        max_output_tokens=12,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    known.append([entry.token for entry in response.output[-1].content[0].logprobs])
    assert known[0] == known[1] == known[2]


def test_a_conversation_with_the_real_policy_is_kept(client: OpenAI) -> None:
    first = client.responses.create(**GREEDY, input=[USER], max_output_tokens=16)
    second: Any = client.responses.create(
        **GREEDY, input="And 2 + 2?", previous_response_id=first.id, max_output_tokens=16
    )
    before: Any = first.output[-1]
    known = [*before.prompt_token_ids, *before.generation_token_ids]
    assert second.output[-1].prompt_token_ids[: len(known)] == known
    assert client.responses.retrieve(second.id).output_text == second.output_text
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in listed] == ["message", *(item.type for item in first.output), "message"]
    background = client.responses.create(**GREEDY, input=[USER], max_output_tokens=16, background=True)
    while background.status in ("queued", "in_progress"):
        background = client.responses.retrieve(background.id)
    assert background.output_text == first.output_text


@pytest_asyncio.fixture
async def held(serve: Serve) -> tuple[HeldEngine, str]:
    """An engine that never answers, and its server."""
    engine = HeldEngine([])
    return engine, await serve(engine=engine)


async def _response(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.responses.create(model="policy", input="q", **fields)


async def _chat(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(model="policy", messages=[USER], **fields)


@pytest.mark.asyncio
@pytest.mark.parametrize("ask", [_response, _chat], ids=["responses", "chat"])
class TestLeaving:
    async def test_a_timeout_aborts_the_generation(self, held: tuple[HeldEngine, str], ask: Any) -> None:
        engine, url = held
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=1.5) as client:
            with pytest.raises(APITimeoutError):
                await ask(client)
            await until(lambda: engine.cancelled == 1)

    async def test_a_closed_stream_aborts_the_generation(
        self, held: tuple[HeldEngine, str], ask: Any
    ) -> None:
        engine, url = held
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            async with await ask(client, stream=True):
                await engine.started.wait()
            await until(lambda: engine.cancelled == 1)

    async def test_a_cancelled_task_aborts_the_generation(
        self, held: tuple[HeldEngine, str], ask: Any
    ) -> None:
        engine, url = held
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            task = asyncio.create_task(ask(client))
            await engine.started.wait()
            task.cancel()
            await until(lambda: engine.cancelled == 1)
            with pytest.raises(asyncio.CancelledError):
                await task


@pytest.mark.asyncio
async def test_a_stream_of_chat_calls_of_both_kinds(scripted: Scripted) -> None:
    says = [call_text("1 + 2"), named_call("run", input="print(1)")]
    tools: Any = [CHAT_TOOL, {"type": "custom", "custom": {"name": "run"}}]
    async with AsyncOpenAI(base_url=await scripted(says), api_key="none", max_retries=0) as client:
        asked: Any = {"model": "policy", "messages": [USER], "tools": tools}
        async with client.chat.completions.stream(**asked) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        assert calculate(final.choices[0].message.tool_calls[0].function.arguments) == "3"
        chunks = await client.chat.completions.create(**asked, stream=True)
        deltas: list[Any] = [chunk.choices[0].delta async for chunk in chunks]
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (call.type, call.custom) == ("custom", {"name": "run", "input": "print(1)"})


@pytest.mark.asyncio
async def test_what_runs_in_the_background_is_cancelled_by_id(held: tuple[HeldEngine, str]) -> None:
    engine, url = held
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        queued = await client.responses.create(model="policy", input="q", background=True)
        await engine.started.wait()
        cancelled = await client.responses.cancel(queued.id)
        assert cancelled.status == "cancelled"
        assert (await client.responses.retrieve(queued.id)).status == "cancelled"
    assert (engine.cancelled, engine.running) == (1, 0)


@pytest.mark.asyncio
async def test_an_engine_that_breaks(serve: Serve) -> None:
    engine = HeldEngine([], error=RuntimeError("the engine broke"))
    async with AsyncOpenAI(base_url=await serve(engine=engine), api_key="none", max_retries=0) as client:
        stream = await _response(client, stream=True)
        engine.release.set()
        last = [event async for event in stream][-1]
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert "the engine broke" in last.response.error.message
        engine.release.clear()
        chunks = await _chat(client, stream=True)
        engine.release.set()
        with pytest.raises(APIError, match="the engine broke"):
            async for _ in chunks:
                pass
        for ask in (_response, _chat):
            with pytest.raises(InternalServerError, match="the engine broke"):
                await ask(client)


@pytest.mark.asyncio
async def test_keys(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode("Hello.<|im_end|>")]), renderer)
    async with (
        operated(policy, access=AccessConfig(api_keys=("right",))) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(AuthenticationError) as refused:
            await _response(client)
        assert refused.value.code == "invalid_api_key"
        assert (await _response(client.with_options(api_key="right"))).output_text == "Hello."


async def _rejected(server: Server) -> float:
    """Return how many requests a server had no place for."""
    metrics = (await server.ask("GET", "/metrics")).body.decode()
    found = re.search(r'gym_http_rejected_total\{limit="concurrency"\} (\S+)', metrics)
    return float(found[1]) if found else 0.0


@pytest.mark.asyncio
async def test_a_server_that_is_full(renderer: TemplateRenderer) -> None:
    engine = HeldEngine([renderer.encode("Hello.<|im_end|>")] * 2)
    policy = Policy(engine, renderer)
    async with (
        operated(policy, limits=RequestLimits(max_concurrent=1)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        first = asyncio.create_task(_response(client))
        await engine.started.wait()
        for stream in (False, True):
            with pytest.raises(RateLimitError) as refused:
                await _response(client, stream=stream)
            assert refused.value.code == "rate_limit_exceeded"
        second = asyncio.create_task(_response(client.with_options(max_retries=8)))
        while await _rejected(server) < 3:
            await asyncio.sleep(0.01)
        engine.release.set()
        assert (await first).output_text == (await second).output_text == "Hello."


def test_refusals_of_the_real_policy(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="the context holds") as refused:
        client.responses.create(model="policy", input="word " * 3000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="policy", messages=[USER], temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(model="policy", input="q", tools=[{"type": "web_search"}])
    assert (refused.value.param, refused.value.code) == ("tools[0].type", "unsupported_parameter")
