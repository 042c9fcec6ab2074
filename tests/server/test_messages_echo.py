"""Whatever was sampled: an agent that echoes its messages continues it, and no body breaks the server."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support.agents import call_text, say_text
from support.claude import CALCULATOR, THINKS, TokenwiseEngine
from support.operating import operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.surfaces import MessagesSurface
from gym_sdk.schema import Response
from gym_sdk.tokens import merge_calls

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USER = {"role": "user", "content": "hi"}
SAYINGS = [
    THINKS,
    say_text("Plain words."),
    "<think>\nonly thought",
    '<tool_call>\n{"name": "calculator", "arguments": [1, "x"]}\n</tool_call>and more<|im_end|>',
    call_text("1").replace("<|im_end|>", "") + call_text("2"),
    "<|im_end|>",
    "cut in the mid",
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.sampled_from(SAYINGS), min_size=1, max_size=4), number=st.integers(0, 2**32))
def test_whatever_is_echoed_continues_what_was_sampled(
    renderer: TemplateRenderer, turns: list[str], number: int
) -> None:
    async def converse() -> list[Response]:
        policy = Policy(TokenwiseEngine([renderer.encode(text) for text in [*turns, "end"]]), renderer)
        history: list[dict[str, Any]] = [USER]
        responses = []
        for _ in range(len(turns) + 1):
            body = {"model": "policy", "max_tokens": 512, "messages": history, "tools": [CALCULATOR]}
            asked = MessagesSurface().read(body, model="policy", form="item")
            response = await policy.respond(asked.requests[0], scope=f"ro_{number}")
            responses.append(response)
            message = json.loads(json.dumps(asked.write([response])))
            uses = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
            results = [{"type": "tool_result", "tool_use_id": use, "content": "3"} for use in uses]
            history = [
                *history,
                {"role": "assistant", "content": message["content"]},
                {"role": "user", "content": [*results, {"type": "text", "text": "go on"}]},
            ]
        return responses

    responses = asyncio.run(converse())
    assert [response.fork for response in responses] == [None] * len(responses)
    rows = merge_calls([response.tokens for response in responses if response.tokens is not None])
    assert len(rows) == 1


def streamed(answer: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream, pings left out."""
    events = []
    for block in answer.decode().removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):  # a comment keeps quiet streams open
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event)
            events.append(event)
    return events


def rebuilt(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the message of its events, by the rules of the API."""
    first, *blocks, ending, last = events
    assert (first["type"], ending["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = first["message"]
    pieces: list[str] = []
    for event in blocks:
        content = message["content"]
        if event["type"] == "content_block_start":
            assert event["index"] == len(content)
            content.append(event["content_block"])
            pieces = []
            continue
        assert event["index"] == len(content) - 1
        if event["type"] == "content_block_stop":
            if content[-1]["type"] == "tool_use":
                content[-1]["input"] = json.loads("".join(pieces))
            continue
        delta = event["delta"]
        kind = delta["type"].removesuffix("_delta")
        if kind == "input_json":
            pieces.append(delta["partial_json"])
        else:
            content[-1][kind] += delta[kind]
    return {**message, **ending["delta"], "usage": ending["usage"]}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(saying=st.sampled_from(SAYINGS), display=st.sampled_from(["summarized", "omitted"]))
def test_the_events_build_the_message(renderer: TemplateRenderer, saying: str, display: str) -> None:
    body = {
        "model": "policy",
        "max_tokens": 512,
        "messages": [USER],
        "tools": [CALCULATOR],
        "thinking": {"type": "adaptive", "display": display},
    }

    async def both() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        engine = TokenwiseEngine([renderer.encode(saying)] * 2)
        async with operated(Policy(engine, renderer)) as server:
            whole = await server.ask("POST", "/v1/messages", json=body)
            stream = await server.ask("POST", "/v1/messages", json={**body, "stream": True})
        assert whole.status == stream.status == 200
        return whole.body, streamed(stream.body)

    whole, events = asyncio.run(both())
    Message.model_validate(whole)
    assert anonymous(rebuilt(events)) == anonymous(whole)


def anonymous(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the ids that every generation gets anew."""
    text = re.sub(r"(msg|call)_[0-9a-f]{24}", r"\1", json.dumps(message))
    found: dict[str, Any] = json.loads(text)
    return found


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_texts = st.text(max_size=12)
_block = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": _texts}, optional={"citations": _values}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": _texts, "name": _texts},
        optional={"input": st.dictionaries(_texts, _values, max_size=2), "caller": _values},
    ),
    st.fixed_dictionaries(
        {"type": st.just("tool_result"), "tool_use_id": _texts},
        optional={"content": _texts | _values, "is_error": st.booleans()},
    ),
    st.fixed_dictionaries(
        {"type": st.just("thinking"), "thinking": _texts, "signature": _texts | st.just("gymr1.eJw=")}
    ),
    st.fixed_dictionaries({"type": st.just("redacted_thinking"), "data": _texts}),
    st.fixed_dictionaries({"type": _texts | _values}),
    _values,
)
_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": _texts | st.lists(_block, max_size=3) | _values,
    },
    optional={"prompt_token_ids": _values, "generation_token_ids": _values},
)
_bodies = st.fixed_dictionaries(
    {"messages": st.lists(_message, min_size=1, max_size=4).map(lambda found: [*found, USER])},
    optional={
        "system": _texts | st.lists(_block, max_size=2) | _values,
        "tools": st.lists(st.just(CALCULATOR) | _values, max_size=2),
        "tool_choice": st.fixed_dictionaries({"type": st.sampled_from(["auto", "any", "tool"])}) | _values,
        "thinking": st.fixed_dictionaries({"type": st.sampled_from(["adaptive", "disabled"])}) | _values,
        "output_config": _values,
        "temperature": st.floats() | _values,
        "top_k": st.integers() | _values,
        "seed": st.integers() | _values,
        "stop_sequences": st.lists(_texts, max_size=2) | _values,
        "metadata": _values,
        "stream": st.booleans(),
        "chat_template_kwargs": st.dictionaries(_texts, _values, max_size=2),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(bodies=st.lists(_bodies, min_size=4, max_size=4))
def test_no_body_breaks_the_server(renderer: TemplateRenderer, bodies: list[dict[str, Any]]) -> None:
    async def ask_all() -> None:
        engine = ReplayEngine([renderer.encode(say_text("ok"))] * len(bodies))
        async with operated(Policy(engine, renderer)) as server:
            for body in bodies:
                asked = {"model": "policy", "max_tokens": 9, **body}
                data = json.dumps(asked).encode()
                answer = await server.ask("POST", "/v1/messages", data=data)
                assert answer.status in (200, 400), answer.body
                if answer.status == 400:
                    assert set(answer.body) == {"type", "error", "request_id"}
                    assert set(answer.body["error"]) == {"type", "message"}
                counted = {name: asked[name] for name in ("model", "messages", "tools") if name in asked}
                count = await server.ask("POST", "/v1/messages/count_tokens", data=json.dumps(counted))
                assert count.status in (200, 400), count.body

    asyncio.run(ask_all())
