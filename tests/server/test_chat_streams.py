"""Streamed chat completions: every chunk is openai's, and together they are the whole answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from support.agents import CHAT_TOOL, call_text, say_text
from support.capturing import Serve
from support.chatting import StepEngine, chunks_of, post
from support.held import HeldEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from gym_sdk.schema import TOKEN_FIELDS

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "1 + 2 ="}
THINKS = "<think>\nSo.\n</think>\n\nLet me see.\n" + call_text("1 + 2")
RUN = {"type": "custom", "custom": {"name": "run"}}
RUN_CALL = '<tool_call>\n{"name": "run", "arguments": {"input": "print(1)"}}\n</tool_call>'
FLUID = ("id", "created")
"""What no two answers have in common."""


def check(chunk: Mapping[str, Any]) -> None:
    """Judge a chunk by openai's type, which knows no deltas of custom calls."""
    choices = []
    for choice in chunk["choices"]:
        calls = choice["delta"].get("tool_calls", ())
        delta = {**choice["delta"], "tool_calls": [{**call, "type": "function"} for call in calls]}
        choices.append({**choice, "delta": delta})
    ChatCompletionChunk.model_validate({**chunk, "choices": choices})


def joined(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put a completion together as clients do."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        check(chunk)
        whole |= {name: value for name, value in chunk.items() if name != "choices"}
        for choice in chunk["choices"]:
            known = choices.setdefault(choice["index"], {"index": choice["index"], "message": {}})
            assert known.get("finish_reason") is None, "a choice went on after its end"
            said, delta = known["message"], dict(choice["delta"])
            for name in ("content", "reasoning_content"):
                if name in delta:
                    said[name] = said.get(name, "") + delta.pop(name)
            for call in delta.pop("tool_calls", ()):
                calls = said.setdefault("tool_calls", [])
                assert call["index"] == len(calls)
                calls.append({name: value for name, value in call.items() if name != "index"})
            said |= delta
            scores = choice["logprobs"]
            if scores is not None:
                known.setdefault("logprobs", {"content": [], "refusal": None})
                known["logprobs"]["content"] += scores["content"]
            known |= {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}
    whole["object"] = "chat.completion"
    whole["choices"] = [choice for _, choice in sorted(choices.items())]
    return whole


def told(completion: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
    """Return what a completion says, in the form that both ways share."""
    ChatCompletion.model_validate(completion)
    choices = []
    for choice in completion["choices"]:
        said = {"refusal": None, **choice["message"], "content": choice["message"].get("content") or ""}
        said["generation_log_probs"] = [round(value, 3) for value in said["generation_log_probs"]]
        scores = [
            (entry["token"], entry["bytes"], round(entry["logprob"], 3))
            for entry in (choice.get("logprobs") or {"content": []})["content"]
        ]
        assert bool(choice.get("logprobs")) <= scored
        calls = [{**call, "id": ""} for call in said.pop("tool_calls", ())]
        choices.append({**choice, "message": said, "logprobs": scores, "calls": calls})
    rest = {name: value for name, value in completion.items() if name not in FLUID}
    # the second time the prompt is cached
    usage = {name: value for name, value in completion["usage"].items() if name != "prompt_tokens_details"}
    return {**rest, "usage": usage, "choices": choices}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"n": 2, "logprobs": True, "top_logprobs": 2},
        {"stop": ["a", "e"], "logprobs": True},
        {"tools": [CHAT_TOOL, RUN], "tool_choice": "required", "max_tokens": 120},
        {"response_format": {"type": "json_object"}, "max_tokens": 60, "logprobs": True},
    ],
    ids=lambda fields: "+".join(fields) or "plain",
)
async def test_the_chunks_are_the_answer(chat_url: str, fields: dict[str, Any]) -> None:
    url = f"{chat_url}/chat/completions"
    for seed in range(4):
        body = {"messages": [USER], "max_tokens": 24, "seed": seed, **fields}
        status, whole = await post(url, body)
        assert status == 200, whole
        chunks = await chunks_of(url, {**body, "stream_options": {"include_usage": True}})
        assert len({chunk["id"] for chunk in chunks}) == 1
        scored = "logprobs" in fields
        assert told(joined(chunks), scored=scored) == told(whole, scored=scored)


SAYS = st.lists(
    st.sampled_from(
        ["Größe ", "東京", "🙂", " end", "en", "d", "<think>\nSo.\n</think>\n\n", RUN_CALL, "\n"]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_text_never_goes_back(renderer: TemplateRenderer, data: st.DataObject) -> None:
    says = renderer.encode(data.draw(SAYS) + "<|im_end|>")
    stop = data.draw(st.lists(st.sampled_from(["end", "京🙂", "ß"]), max_size=2, unique=True))
    body: dict[str, Any] = {"messages": [USER], "tools": [RUN], "stop": stop, "logprobs": True}
    app = make_app(Policy(StepEngine([says, says]), renderer))
    async with TestServer(app, handler_cancellation=True) as server:
        url = str(server.make_url("/v1/chat/completions"))
        chunks = await chunks_of(url, {**body, "stream_options": {"include_usage": True}})
        status, whole = await post(url, body)
    assert status == 200, whole
    assert told(joined(chunks), scored=True) == told(whole, scored=True)


async def test_usage_comes_last_and_only_if_asked_for(chat_url: str) -> None:
    body = {"messages": [USER], "max_tokens": 4, "n": 2}
    plain = await chunks_of(f"{chat_url}/chat/completions", body)
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
    *chunks, last = await chunks_of(
        f"{chat_url}/chat/completions", {**body, "stream_options": {"include_usage": True}}
    )
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    ended = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"] is not None]
    generated = sum(len(chunk["choices"][0]["delta"]["generation_token_ids"]) for chunk in ended)
    assert last["usage"]["completion_tokens"] == generated


async def test_tokens_travel_once_in_the_delta_that_ends_a_choice(serve: Serve) -> None:
    url = await serve([THINKS])
    chunks = await chunks_of(f"{url}/chat/completions", {"messages": [USER], "tools": [CHAT_TOOL]})
    carrying = [chunk for chunk in chunks if set(TOKEN_FIELDS) & set(chunk["choices"][0]["delta"])]
    assert carrying == chunks[-1:]
    assert carrying[0]["choices"][0]["finish_reason"] == "tool_calls"
    assert set(carrying[0]["choices"][0]["delta"]) == set(TOKEN_FIELDS)
    assert carrying[0]["system_fingerprint"] == "0"


async def test_a_custom_call_is_streamed_as_one(serve: Serve) -> None:
    url = await serve([RUN_CALL + "<|im_end|>"])
    chunks = await chunks_of(f"{url}/chat/completions", {"messages": [USER], "tools": [RUN]})
    (call,) = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert call == {
        "index": 0,
        "id": call["id"],
        "type": "custom",
        "custom": {"name": "run", "input": "print(1)"},
    }


async def test_choices_that_fail_end_the_stream(serve: Serve) -> None:
    """The stream says so at once, and does not wait for its next keep-alive."""
    engine = HeldEngine([], error=RuntimeError("the engine broke"), after_s=0.1)
    url = await serve(engine=engine)
    body = {"messages": [USER], "n": 2, "stream": True}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/chat/completions", json=body) as answer:
            text = await answer.text()
    assert answer.status == 200
    *_, failure = text.removesuffix("\n\n").split("\n\n")
    assert json.loads(failure.removeprefix("data: "))["error"]["message"] == "RuntimeError: the engine broke"
    assert engine.running == 0


async def test_a_whole_conversation_of_choices_continues(serve: Serve) -> None:
    """Each of two answers that say the same can be gone on with, from its own tokens."""
    url = await serve([say_text("Hm."), "Hm.", say_text("Go on."), say_text("Go on.")])
    path = f"{url}/chat/completions"
    _, first = await post(path, {"messages": [USER], "n": 2})
    for choice in first["choices"]:
        said = choice["message"]
        messages = [USER, said, {"role": "user", "content": "and?"}]
        _, second = await post(path, {"messages": messages})
        prompt = second["choices"][0]["message"]["prompt_token_ids"]
        tokens = [*said["prompt_token_ids"], *said["generation_token_ids"]]
        assert prompt[: len(tokens)] == tokens
