"""What a rollout reads of a response is what the whole response says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gym_sdk.errors import TokenContractError
from gym_sdk.schema import Response, Turn
from gym_sdk.tokens import CallTokens

IDS = st.lists(st.integers(0, 9), max_size=4)
OUTPUT = st.lists(
    st.sampled_from(
        [
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]},
            {"role": "assistant", "content": "hi", "id": "msg_1"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "extra": 1},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "web_search_call", "id": "ws_1"},
        ]
    ),
    max_size=3,
)


@st.composite
def bundles(draw: st.DrawFn) -> dict[str, Any]:
    generation = draw(IDS)
    fields: dict[str, Any] = {
        "generation_token_ids": generation,
        "generation_log_probs": [-0.5] * len(generation),
    }
    if draw(st.booleans()):
        fields["weight_versions"] = [{"version": "v1", "start": 0, "end": len(generation)}]
    return fields


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {"id": "resp_1", "created_at": 1.0, "model": "policy", "output": draw(OUTPUT)}
    optional: dict[str, st.SearchStrategy[Any]] = {
        "status": st.sampled_from(["completed", "incomplete", "failed"]),
        "usage": st.sampled_from([None, {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}]),
        "error": st.sampled_from([None, {"code": "server_error", "message": "broken"}]),
        "fork": st.sampled_from([None, "edited"]),
        "unparsed_calls": st.integers(0, 2),
        "previous_response_id": st.sampled_from([None, "resp_0"]),
        "temperature": st.just(1.0),
        "surprise": st.just({"a": 1}),
    }
    body |= {name: draw(values) for name, values in optional.items() if draw(st.booleans())}
    form = draw(st.sampled_from(["none", "delta", "extending", "response", "item"]))
    if form in ("delta", "extending"):
        extends = "resp_0" if form == "extending" else None
        body["token_delta"] = {"extends": extends, "new_prompt_token_ids": draw(IDS), **draw(bundles())}
    elif form == "response":
        body |= {"prompt_token_ids": draw(IDS), **draw(bundles())}
    elif form == "item" and body["output"]:
        body["output"] = [
            *body["output"][:-1],
            {**body["output"][-1], "prompt_token_ids": [1], **draw(bundles())},
        ]
    return body


@given(bodies())
def test_reading_little_is_reading_all(body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    read, whole = Turn.read(data), Turn.of(Response.model_validate_json(data))
    assert read == whole
    known = {"resp_0": CallTokens([1], [2], [-0.1])}
    assert read.tokens_after(known) == Response.model_validate_json(data).tokens_after(known)


@given(
    bodies(),
    st.sampled_from(["id", "output", "status", "usage", "token_delta"]),
    st.sampled_from([7, "x", {}]),
)
def test_what_is_no_response_is_refused_by_both(body: dict[str, Any], name: str, value: Any) -> None:
    data = json.dumps(body | {name: value}).encode()
    try:
        Turn.read(data)
    except ValidationError:
        with pytest.raises(ValidationError):
            Response.model_validate_json(data)


def test_tokens_that_contradict_each_other() -> None:
    body = {"id": "r", "created_at": 1.0, "model": "m", "output": [], "prompt_token_ids": [1]}
    with pytest.raises(TokenContractError, match="generation_token_ids"):
        Turn.read(json.dumps(body).encode())
    delta = {
        "extends": "gone",
        "new_prompt_token_ids": [],
        "generation_token_ids": [1],
        "generation_log_probs": [0],
    }
    turn = Turn.read(json.dumps(body | {"prompt_token_ids": None, "token_delta": delta}).encode())
    with pytest.raises(TokenContractError, match="gone"):
        turn.tokens_after({})
