"""Whatever is sent to Chat Completions and Completions is answered or refused; the server goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agents import CHAT_TOOL
from support.chatting import post

from backends.loading import PolicyConfig, load_policy
from backends.server import make_app

pytestmark = pytest.mark.asyncio

TEXT = st.text(max_size=8)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAME = st.sampled_from(["calculator", "run", "other", ""])
IDS = st.lists(st.integers(-1, 500), max_size=4)


def odd(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Now and then something else than there should be."""
    return st.one_of(*[strategy] * 9, JSON)


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object with some of the fields; those that tell what it is are there."""
    odds = {name: odd(value) for name, value in fields.items()}
    always = {name: odds.pop(name) for name in ("role", "type", "name") if name in odds}
    return st.fixed_dictionaries(always, optional=odds)


PART = record(type=st.sampled_from(["text", "refusal", "image_url"]), text=TEXT, refusal=TEXT)
CONTENT = TEXT | st.lists(PART, max_size=2)
FUNCTION = record(name=NAME, arguments=TEXT, input=TEXT)
CALL = record(id=TEXT, type=st.sampled_from(["function", "custom"]), function=FUNCTION, custom=FUNCTION)
ROLE = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
MESSAGE = record(
    role=ROLE,
    content=CONTENT,
    name=TEXT,
    refusal=TEXT,
    tool_calls=st.lists(CALL, max_size=2),
    tool_call_id=TEXT,
    reasoning_content=TEXT,
    prompt_token_ids=IDS,
    generation_token_ids=IDS,
    generation_log_probs=st.lists(st.floats(-9, 0), max_size=4),
)
SCHEMA = odd(st.just({"type": "object", "properties": {"a": {"type": "integer"}}}))
TOOL = record(
    type=st.sampled_from(["function", "custom", "web_search"]),
    function=record(name=NAME, parameters=SCHEMA, strict=st.booleans(), description=TEXT),
    custom=record(name=NAME, format=record(type=st.sampled_from(["text", "grammar"]))),
)
CHOICE = st.sampled_from(["auto", "none", "required"]) | record(
    type=st.sampled_from(["function", "custom", "allowed_tools"]),
    function=record(name=NAME),
    custom=record(name=NAME),
    allowed_tools=record(mode=st.sampled_from(["auto", "required"]), tools=st.lists(TOOL, max_size=2)),
)
SETTINGS = {
    "stream": st.booleans(),
    "n": st.integers(1, 3),
    "seed": st.integers(-5, 2**70),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0, 1),
    "stop": TEXT | st.lists(TEXT, max_size=3),
    "frequency_penalty": st.sampled_from([0, 0.5]),
}
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {
    **SETTINGS,
    "tools": st.lists(st.just(CHAT_TOOL) | TOOL, max_size=2),
    "tool_choice": CHOICE,
    "parallel_tool_calls": st.booleans(),
    "response_format": record(
        type=st.sampled_from(["text", "json_object", "json_schema"]),
        json_schema=record(name=TEXT, schema=SCHEMA, strict=st.booleans()),
    ),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "max_completion_tokens": st.integers(1, 8),
    "reasoning_effort": st.sampled_from(["none", "low", "high"]),
    "verbosity": st.sampled_from(["low", "medium"]),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "tools"]), JSON, max_size=1),
    "metadata": st.dictionaries(TEXT, TEXT, max_size=1),
}
PROMPT = TEXT | IDS | st.lists(TEXT | IDS, max_size=2)
COMPLETION = {
    **SETTINGS,
    "prompt": PROMPT,
    "logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "add_special_tokens": st.booleans(),
}


def body_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A body with some of the fields, now and then one of them odd."""
    names = sorted(fields)
    others = ("stream_options", "store", "audio", "suffix", "best_of", "other")
    some = st.lists(st.sampled_from(names), max_size=5, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen})
    )
    wrong = st.dictionaries(st.sampled_from([*names, *others]), JSON, min_size=1, max_size=1)
    return st.tuples(some, st.one_of(*[st.just({})] * 3, wrong)).map(lambda both: {**both[0], **both[1]})


@pytest_asyncio.fixture
async def url(untrained_policy: Path) -> AsyncIterator[str]:
    policy = load_policy(PolicyConfig(model=str(untrained_policy), context_length=96))
    async with TestServer(make_app(policy), handler_cancellation=True) as server:
        yield str(server.make_url("/v1"))
    await policy.aclose()


async def survives(url: str, body: dict[str, Any], shape: str) -> None:
    """Send a body; the answer is whole, or a refusal in OpenAI's shape, and the server goes on."""
    async with aiohttp.ClientSession() as session, session.post(url, data=json.dumps(body)) as answer:
        text = await answer.text()
    assert answer.status in (200, 400, 404), text
    if answer.status != 200:
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    elif body.get("stream"):
        assert text.endswith("data: [DONE]\n\n"), text
    else:
        assert json.loads(text)["object"] == shape


LIMITS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@LIMITS
@given(
    messages=st.one_of(*[st.just(HELLO)] * 2, odd(st.lists(MESSAGE, max_size=3).map(HELLO.__add__))),
    body=body_of(CHAT),
)
async def test_any_chat_is_answered_or_refused(url: str, messages: Any, body: dict[str, Any]) -> None:
    limited = {"max_tokens": 4} if "max_completion_tokens" not in body else {}
    await survives(f"{url}/chat/completions", {"messages": messages, **limited, **body}, "chat.completion")


@LIMITS
@given(body=body_of(COMPLETION))
async def test_any_completion_is_answered_or_refused(url: str, body: dict[str, Any]) -> None:
    await survives(f"{url}/completions", {"prompt": "hi", "max_tokens": 4, **body}, "text_completion")


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_numbers_beyond_all_bounds_are_refused(url: str, path: str) -> None:
    huge = "1" + "0" * 5000
    for field in ("n", "max_tokens", "seed", "logprobs", "top_logprobs", "temperature"):
        body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "prompt": "hi", "{field}": {huge}}}'
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/{path}", data=body) as answer:
                assert answer.status == 400, await answer.text()


async def test_a_nested_body_is_refused(url: str) -> None:
    deep: Any = "hi"
    for _ in range(150):
        deep = [deep]
    for path, field in (("chat/completions", "messages"), ("completions", "prompt")):
        status, _ = await post(f"{url}/{path}", {field: deep})
        assert status == 400
