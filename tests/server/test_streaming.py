"""Streams, judged by the openai package's own types and accumulators."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from support.agents import call_text, chat_agent, responses_agent, say_text
from support.capturing import Serve
from support.held import HeldEngine, until

from backends.rendering import TemplateRenderer
from gym_sdk.schema import Response

pytestmark = pytest.mark.asyncio

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USER = {"role": "user", "content": "hi"}
THINKS = "<think>\nSo.\n</think>\n\nLet me see.\n" + call_text("1 + 2")


async def read(url: str, path: str, body: dict[str, Any]) -> tuple[aiohttp.ClientResponse, list[str]]:
    """Return the blocks of a stream."""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/{path}", json=body) as answer:
        text = await answer.text()
    assert text.endswith("\n\n")
    return answer, text[:-2].split("\n\n")


def events_of(blocks: list[str]) -> list[dict[str, Any]]:
    events = []
    assert blocks[-1] == "data: [DONE]"
    for block in blocks[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


async def test_the_events_of_a_response(serve: Serve) -> None:
    url = await serve([THINKS])
    answer, blocks = await read(url, "responses", {"input": [USER], "stream": True})
    assert answer.content_type == "text/event-stream"
    events = events_of(blocks)
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    thought = [name.replace("output_text", "reasoning_text") for name in text]
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", *thought, "output_item.done"),
        *("output_item.added", *text, "output_item.done"),
        *("output_item.added", *call, "output_item.done"),
        "completed",
    ]
    assert {event["response"]["id"] for event in events if "response" in event} == {
        events[0]["response"]["id"]
    }
    assert events[0]["response"]["status"] == "in_progress"
    response = Response.model_validate(events[-1]["response"])
    assert response.tokens is not None
    assert response.usage is not None
    assert response.usage.output_tokens == len(response.tokens.generation_token_ids)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == [item.without_tokens().to_wire() for item in response.output]


async def test_the_openai_package_reads_both_streams(serve: Serve) -> None:
    url = await serve([call_text("1 + 2"), say_text("It is 3.")] * 2)
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        assert await responses_agent(client, "1 + 2?", stream=True) == "It is 3."
        assert await chat_agent(client, "1 + 2?", stream=True) == "It is 3."


async def test_cut_generations_end_incomplete(serve: Serve) -> None:
    url = await serve(["and so", "and so"])
    _, blocks = await read(url, "responses", {"input": [USER], "stream": True})
    event = events_of(blocks)[-1]
    EVENT.validate_python(event)
    assert event["type"] == "response.incomplete"
    assert event["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert Response.model_validate(event["response"]).tokens is not None
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)  # type: ignore[list-item]
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("usage", [True, False])
async def test_the_chunks_of_a_chat_completion(serve: Serve, usage: bool) -> None:
    url = await serve([THINKS, THINKS])
    body: dict[str, Any] = {"messages": [USER], "stream": True}
    if usage:
        body["stream_options"] = {"include_usage": True}
    _, blocks = await read(url, "chat/completions", body)
    assert blocks.pop() == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        assert ("usage" in chunk) is usage
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1]["reasoning_content"].strip() == "So."
    assert deltas[2]["content"].strip() == "Let me see."
    assert deltas[3]["tool_calls"][0]["index"] == 0
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [*[None] * 4, "tool_calls"]
    assert len(deltas[4]["generation_token_ids"]) == len(deltas[4]["generation_log_probs"]) > 0
    assert deltas[4]["prompt_token_ids"]
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        async with client.chat.completions.stream(model="policy", messages=[USER]) as stream:  # type: ignore[list-item]
            message: Any = (await stream.get_final_completion()).choices[0].message
    assert message.generation_token_ids == deltas[4]["generation_token_ids"]


async def test_the_stream_opens_at_once_and_says_that_it_is_alive(
    serve: Serve, renderer: TemplateRenderer
) -> None:
    engine = HeldEngine([renderer.encode(say_text("done"))])
    url = await serve(engine=engine, keep_alive_s=0.02)
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/responses", json={"input": "q", "stream": True}) as answer:
            seen = [(await answer.content.readuntil(b"\n\n")).decode() for _ in range(5)]
            assert [block.split("\n")[0] for block in seen] == [
                "event: response.created",
                "event: response.in_progress",
                *[": keep-alive"] * 3,
            ]
            engine.release.set()
            assert "response.completed" in await answer.text()


@pytest.mark.parametrize("path", ["responses", "chat/completions"])
async def test_a_reader_that_goes_away_cancels_the_generation(serve: Serve, path: str) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine)
    async with aiohttp.ClientSession() as session:
        body = {"input": "q", "messages": [USER], "stream": True}
        body.pop("messages" if path == "responses" else "input")
        async with session.post(f"{url}/{path}", json=body) as answer:
            await answer.content.readuntil(b"\n\n")
            assert engine.running == 1
    await until(lambda: engine.cancelled == 1)
    assert engine.running == 0


async def test_refusals_are_http_errors_before_the_stream(serve: Serve) -> None:
    url = await serve()
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(NotFoundError, match="serves 'policy'"):
            await client.responses.create(model="gpt-9", input="q", stream=True)
        with pytest.raises(BadRequestError, match="include"):
            await client.responses.create(model="policy", input="q", stream=True, include=["x"])  # type: ignore[list-item]
        with pytest.raises(BadRequestError, match="obfuscat"):
            await client.responses.create(
                model="policy", input="q", stream=True, stream_options={"include_obfuscation": True}
            )
        with pytest.raises(BadRequestError, match="the context holds"):
            await client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": "word " * 60_000}],
                stream=True,
            )


async def test_failures_after_the_first_byte_are_events(serve: Serve) -> None:
    url = await serve(engine=HeldEngine([], error=RuntimeError("the engine broke"), after_s=0.1))
    _, blocks = await read(url, "responses", {"input": "q", "stream": True})
    event = events_of(blocks)[-1]
    EVENT.validate_python(event)
    assert event["type"] == "response.failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "RuntimeError: the engine broke"}
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="policy", messages=[USER], stream=True)  # type: ignore[list-item]
        with pytest.raises(APIError, match="the engine broke"):
            async for _ in stream:
                pass
