"""Items, requests and responses keep what they are given and refuse what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gym_sdk.schema import (
    FunctionCall,
    FunctionCallOutput,
    Message,
    OutputText,
    Reasoning,
    Response,
    ResponseRequest,
    UnknownItem,
    UnknownPart,
    as_items,
)
from gym_sdk.tokens import CallTokens, WeightSpan

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
known_fields = {
    "type",
    "role",
    "content",
    "id",
    "status",
    "call_id",
    "name",
    "arguments",
    "output",
    "summary",
}
token_fields = {"prompt_token_ids", "generation_token_ids", "generation_log_probs", "weight_versions"}
extra_fields = st.dictionaries(
    st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda name: name not in known_fields | token_fields),
    json_values,
    max_size=3,
)
parts = st.one_of(
    st.builds(lambda text, extra: {**extra, "type": "input_text", "text": text}, st.text(), extra_fields),
    st.builds(
        lambda text, extra: {**extra, "type": "output_text", "text": text, "annotations": []},
        st.text(),
        extra_fields,
    ),
    st.builds(lambda text: {"type": "refusal", "refusal": text}, st.text()),
    st.builds(lambda extra: {**extra, "type": "input_image", "image_url": "data:,"}, extra_fields),
)
items = st.one_of(
    st.builds(
        lambda role, content, extra: {**extra, "type": "message", "role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "developer"]),
        st.text() | st.lists(parts, max_size=3),
        extra_fields,
    ),
    st.builds(
        lambda arguments, extra: {
            **extra,
            "type": "function_call",
            "call_id": "c",
            "name": "f",
            "arguments": arguments,
            "status": None,
        },
        st.text(),
        extra_fields,
    ),
    st.builds(
        lambda output, extra: {**extra, "type": "function_call_output", "call_id": "c", "output": output},
        st.text() | st.lists(parts, max_size=2),
        extra_fields,
    ),
    st.builds(
        lambda extra: {**extra, "type": "reasoning", "summary": [], "encrypted_content": "opaque"},
        extra_fields,
    ),
    st.builds(lambda extra: {**extra, "type": "item_reference", "id": "msg_1"}, extra_fields),
    st.builds(lambda extra: {**extra, "type": "web_search_call", "action": {"q": [1]}}, extra_fields),
)


@given(st.lists(items, max_size=4))
def test_every_item_survives_a_round_trip_unchanged(wire: list[dict[str, object]]) -> None:
    assert [item.to_wire() for item in as_items(wire)] == wire


def test_kinds_are_told_apart() -> None:
    wire = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "computer_call", "id": "x"},
        {"type": "message", "role": "user", "content": [{"type": "input_audio", "data": ""}]},
    ]
    kinds = [Message, Reasoning, FunctionCall, FunctionCallOutput, UnknownItem, Message]
    found = as_items(wire)
    assert [type(item) for item in found] == kinds
    assert isinstance(found[-1], Message)
    assert isinstance(found[-1].content, list)
    assert isinstance(found[-1].content[0], UnknownPart)


def test_what_is_no_item_is_refused_with_its_position() -> None:
    with pytest.raises(ValidationError, match="needs a `type`") as caught:
        as_items([{"role": "user", "content": "a"}, {"content": "b"}])
    assert caught.value.errors()[0]["loc"][0] == 1


def test_items_made_in_python_say_their_type() -> None:
    assert Message(role="user", content="a").to_wire() == {"type": "message", "role": "user", "content": "a"}
    part = OutputText(text="x")
    assert part.to_wire() == {"type": "output_text", "text": "x", "annotations": []}


def test_token_fields_are_all_or_none() -> None:
    whole = {
        "prompt_token_ids": [1, 2],
        "generation_token_ids": [3],
        "generation_log_probs": [-0.5],
        "weight_versions": [{"version": "0", "start": 0, "end": 1}],
    }
    message = {"type": "message", "role": "assistant", "content": "x"}
    item = as_items([{**message, **whole}])[0]
    assert item.tokens == CallTokens([1, 2], [3], [-0.5], (WeightSpan("0", 0, 1),))
    assert item.to_wire() == {**message, **whole}
    assert item.without_tokens().to_wire() == message
    for missing in ("prompt_token_ids", "generation_token_ids", "generation_log_probs"):
        partial = {name: value for name, value in whole.items() if name != missing}
        with pytest.raises(ValidationError, match=f"{missing} missing"):
            as_items([{**message, **partial}])


def test_request_keeps_unknown_fields_and_checks_known_ones() -> None:
    body = {"model": "m", "input": "hi", "temperature": 0.5, "x_trace": {"a": 1}}
    assert ResponseRequest.model_validate(body).to_wire() == body
    for field, value in [("temperature", -1), ("top_p", 0), ("max_output_tokens", 0), ("input", 3)]:
        with pytest.raises(ValidationError) as caught:
            ResponseRequest.model_validate({**body, field: value})
        assert field in str(caught.value)


def test_response_reads_its_text_and_tokens_from_the_last_item_that_has_them() -> None:
    body = {
        "id": "resp_1",
        "created_at": 1.0,
        "model": "m",
        "output": [
            {"type": "reasoning", "summary": []},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "content": [{"type": "output_text", "text": "5", "annotations": []}],
                "prompt_token_ids": [1],
                "generation_token_ids": [2],
                "generation_log_probs": [-1.0],
            },
        ],
        "x_new_field": 1,
    }
    response = Response.model_validate(body)
    assert response.output_text == "5"
    assert response.tokens is not None
    assert response.tokens.token_ids == [1, 2]
    assert response.to_wire()["x_new_field"] == 1
