"""What any backend promises for the other ways to ask, judged by the types of openai and anthropic."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from conformance.responses import CALCULATOR, SUM, TOKENS, Check, Server

CHECKS: list[Check] = []

CHAT_TOOL = {
    "type": "function",
    "function": {name: CALCULATOR[name] for name in ("name", "description", "parameters")},
}
CLAUDE_TOOL = {
    "name": "calculator",
    "description": CALCULATOR["description"],
    "input_schema": CALCULATOR["parameters"],
}
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


async def post(server: Server, path: str, **body: Any) -> Any:
    async with server.session.post(f"{server.url}/{path}", json=body) as answer:
        got = await answer.json()
        assert answer.status == 200, got
    return got


@asynccontextmanager
async def streamed(server: Server, path: str, **body: Any) -> AsyncIterator[list[str]]:
    """The data of each event."""
    async with server.session.post(f"{server.url}/{path}", json={**body, "stream": True}) as answer:
        text = await answer.text()
        assert (answer.status, answer.content_type) == (200, "text/event-stream"), text
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    yield [block.split("data: ", 1)[1] for block in blocks]


async def chat(server: Server, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": SUM}], "max_completion_tokens": 60, **body}
    got: dict[str, Any] = await post(server, "chat/completions", **asked)
    ChatCompletion.model_validate(got)
    return got


@check
async def chat_completions_are_whole(server: Server) -> None:
    got = await chat(server, logprobs=True, top_logprobs=2, tool_choice="none", tools=[CHAT_TOOL])
    (choice,) = got["choices"]
    message = choice["message"]
    assert all(name in message for name in TOKENS)
    assert len(message["generation_token_ids"]) == got["usage"]["completion_tokens"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert (message["content"] or "").encode() in spelled
    assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])


@check
async def chat_choices_are_apart(server: Server) -> None:
    got = await chat(server, n=3)
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
    sizes = [len(choice["message"]["generation_token_ids"]) for choice in got["choices"]]
    assert sum(sizes) == got["usage"]["completion_tokens"]


@check
async def chat_streams_build_the_completion(server: Server) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": SUM}],
        "tools": [CHAT_TOOL],
        "temperature": 0,
        "max_completion_tokens": 60,
    }
    whole = (await chat(server, **asked))["choices"][0]
    async with streamed(
        server, "chat/completions", **asked, stream_options={"include_usage": True}
    ) as events:
        assert events.pop() == "[DONE]"
        chunks = [json.loads(event) for event in events]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert chunks.pop()["usage"]["total_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == (whole["message"]["content"] or "")
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    said = [call["function"] for call in whole["message"].get("tool_calls") or ()]
    assert [call["function"]["name"] for call in calls if call["function"].get("name")] == [
        function["name"] for function in said
    ]
    assert "".join(call["function"].get("arguments") or "" for call in calls) == "".join(
        function["arguments"] for function in said
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


@check
async def chat_formats_and_choices_are_kept(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
    choice = (await chat(server, response_format=form, max_completion_tokens=120))["choices"][0]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), ANSWER)
    named = {"type": "function", "function": {"name": "calculator"}}
    asked: dict[str, Any] = {"tools": [CHAT_TOOL], "tool_choice": named, "max_completion_tokens": 120}
    choice = (await chat(server, **asked))["choices"][0]
    if choice["finish_reason"] != "length":
        (call,) = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), CALCULATOR["parameters"])


@check
async def completions_go_on_with_ids(server: Server) -> None:
    ids = (await post_root(server, "tokenize", prompt="The answer is", add_special_tokens=False))["tokens"]
    asked: dict[str, Any] = {"model": "policy", "max_tokens": 4, "temperature": 0}
    got = await post(server, "completions", prompt=ids, logprobs=1, **asked)
    Completion.model_validate(got)
    (choice,) = got["choices"]
    assert choice["prompt_token_ids"] == ids
    assert len(choice["generation_token_ids"]) == got["usage"]["completion_tokens"] <= 4
    assert choice["logprobs"]["token_logprobs"] == choice["generation_log_probs"]
    text: dict[str, Any] = {"prompt": "The answer is", "add_special_tokens": False}
    by_text = await post(server, "completions", **text, **asked)
    assert by_text["choices"][0]["generation_token_ids"] == choice["generation_token_ids"]


async def post_root(server: Server, path: str, **body: Any) -> Any:
    async with server.session.post(f"{server.url.removesuffix('/v1')}/{path}", json=body) as answer:
        got = await answer.json()
        assert answer.status == 200, got
    return got


@check
async def tokens_are_those_of_a_chat(server: Server) -> None:
    messages = [{"role": "user", "content": SUM}]
    counted = await post_root(server, "tokenize", model="policy", messages=messages)
    assert counted["count"] == len(counted["tokens"])
    got = await chat(server, messages=messages)
    assert got["choices"][0]["message"]["prompt_token_ids"] == counted["tokens"]
    text = await post_root(server, "detokenize", model="policy", tokens=counted["tokens"])
    assert SUM in text["prompt"]


@check
async def messages_are_whole_and_streamed(server: Server) -> None:
    asked: dict[str, Any] = {
        "model": "policy",
        "max_tokens": 60,
        "messages": [{"role": "user", "content": SUM}],
        "tools": [CLAUDE_TOOL],
        "temperature": 0,
    }
    got = await post(server, "messages", **asked)
    Message.model_validate(got)
    assert all(name in got for name in TOKENS)
    assert got["stop_reason"] in ("end_turn", "tool_use", "max_tokens")
    async with streamed(server, "messages", **asked) as events:
        seen = [json.loads(event) for event in events]
    for event in seen:
        if event["type"] != "ping":
            MESSAGE_EVENT.validate_python(event)
    assert (seen[0]["type"], seen[-1]["type"]) == ("message_start", "message_stop")
    deltas = [event["delta"] for event in seen if event["type"] == "content_block_delta"]
    texts = "".join(delta.get("text", "") for delta in deltas)
    assert texts == "".join(block.get("text", "") for block in got["content"])
    inputs = "".join(delta.get("partial_json", "") for delta in deltas)
    calls = [block for block in got["content"] if block["type"] == "tool_use"]
    assert bool(inputs) == bool(calls)


@check
async def messages_demand_calls(server: Server) -> None:
    got = await post(
        server,
        "messages",
        model="policy",
        max_tokens=120,
        messages=[{"role": "user", "content": SUM}],
        tools=[CLAUDE_TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    if got["stop_reason"] != "max_tokens":
        (call,) = [block for block in got["content"] if block["type"] == "tool_use"]
        jsonschema.validate(call["input"], CALCULATOR["parameters"])
