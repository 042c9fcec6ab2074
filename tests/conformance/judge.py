"""Two independent judges of what the server sends: the Open Responses specification and OpenAI's package.

`openresponses-types` holds models made from the specification of 2026-04-24, `openai` those of OpenAI's API.
What only one of them knows is judged by that one; each such place is named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import aiohttp
import openresponses_types.types as spec
from openai.types import responses as openai_types
from pydantic import TypeAdapter

OPENAI_RESPONSE: TypeAdapter[Any] = TypeAdapter(openai_types.Response)
OPENAI_EVENT: TypeAdapter[Any] = TypeAdapter(openai_types.ResponseStreamEvent)

_SPEC_EVENTS = {
    "response.created": spec.ResponseCreatedStreamingEvent,
    "response.queued": spec.ResponseQueuedStreamingEvent,
    "response.in_progress": spec.ResponseInProgressStreamingEvent,
    "response.completed": spec.ResponseCompletedStreamingEvent,
    "response.incomplete": spec.ResponseIncompleteStreamingEvent,
    "response.failed": spec.ResponseFailedStreamingEvent,
    "response.output_item.added": spec.ResponseOutputItemAddedStreamingEvent,
    "response.output_item.done": spec.ResponseOutputItemDoneStreamingEvent,
    "response.content_part.added": spec.ResponseContentPartAddedStreamingEvent,
    "response.content_part.done": spec.ResponseContentPartDoneStreamingEvent,
    "response.output_text.delta": spec.ResponseOutputTextDeltaStreamingEvent,
    "response.output_text.done": spec.ResponseOutputTextDoneStreamingEvent,
    "response.function_call_arguments.delta": spec.ResponseFunctionCallArgumentsDeltaStreamingEvent,
    "response.function_call_arguments.done": spec.ResponseFunctionCallArgumentsDoneStreamingEvent,
}
_OPENAI_ONLY = frozenset(
    {
        # the specification calls it `response.reasoning.*`; clients are OpenAI's
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        # the specification has no custom tools
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
    }
)


def judge_response(body: dict[str, Any]) -> dict[str, Any]:
    """Assert that a response is one to both judges; return it."""
    OPENAI_RESPONSE.validate_python(body)
    for name in openai_types.Response.model_fields:
        if openai_types.Response.model_fields[name].is_required():
            assert name in body, f"`{name}` is missing"
    if not _is_openais_alone(body):
        spec.ResponseResource.model_validate(_as_specified(body))
    return body


def judge_event(event: dict[str, Any]) -> dict[str, Any]:
    """Assert that an event is one to both judges; return it."""
    OPENAI_EVENT.validate_python(event)
    kind = event["type"]
    if kind in _OPENAI_ONLY:
        return event
    judged = dict(event)
    if "response" in judged:
        judge_response(judged["response"])
        if _is_openais_alone(judged["response"]):
            return event
        judged["response"] = _as_specified(judged["response"])
    if judged.get("item", {}).get("type") != "custom_tool_call":
        _SPEC_EVENTS[kind].model_validate(judged)
    return event


def judge_error(answer: aiohttp.ClientResponse, body: Any, *, status: int, param: str | None) -> None:
    """Assert that an error has OpenAI's shape."""
    assert answer.status == status, body
    assert answer.content_type == "application/json"
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param, body
    assert len(body["error"]["message"]) > 10


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, each judged, in a framing that is right."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = [block for block in text.split("\n\n")[:-2] if not block.startswith(":")]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(judge_event(event))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def rebuilt(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Build the output from a stream's deltas alone; assert that each event comes in its place."""
    output: list[dict[str, Any]] = []
    open_item: dict[str, Any] | None = None
    open_part: dict[str, Any] | None = None
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None
            assert event["output_index"] == len(output)
            assert event["item"]["status"] == "in_progress"
            open_item = json.loads(json.dumps(event["item"]))
            continue
        if "output_index" not in event:
            continue
        assert open_item is not None
        assert event["output_index"] == len(output)
        assert event.get("item_id", open_item["id"]) == open_item["id"]
        if kind == "output_item.done":
            assert open_part is None
            assert event["item"]["id"] == open_item["id"]
            output.append(open_item | {"status": event["item"]["status"]})
            for name in ("content", "arguments", "input"):
                assert open_item.get(name) == event["item"].get(name)
            open_item = None
        elif kind == "content_part.added":
            assert open_part is None
            assert event["content_index"] == len(open_item["content"])
            open_part = json.loads(json.dumps(event["part"]))
            assert open_part["text"] == ""
        elif kind == "content_part.done":
            assert open_part == event["part"]
            open_item["content"].append(open_part)
            open_part = None
        elif kind.endswith("_text.delta"):
            assert open_part is not None
            open_part["text"] += event["delta"]
            if event.get("logprobs"):
                open_part["logprobs"] += event["logprobs"]
        elif kind.endswith("_text.done"):
            assert open_part is not None
            assert event["text"] == open_part["text"]
        elif kind.endswith(".delta"):
            open_item["input" if "input" in open_item else "arguments"] += event["delta"]
        elif kind.endswith(".done"):
            field = "input" if "input" in open_item else "arguments"
            assert event[field] == open_item[field]
    assert open_item is None
    return output


def _is_openais_alone(body: dict[str, Any]) -> bool:
    """Whether a response holds custom tools, which the specification does not have."""
    items = [*body["output"], *body["tools"]]
    return any(item["type"] in ("custom", "custom_tool_call") for item in items)


def _as_specified(body: dict[str, Any]) -> dict[str, Any]:
    """Return a response with what the specification's generated models cannot take put aside."""
    judged = json.loads(json.dumps(body))
    form = judged["text"]["format"]
    if form["type"] == "json_schema":
        # its type there is null, and its description and `strict` must be there
        form |= {"schema": None, "description": form.get("description"), "strict": bool(form.get("strict"))}
    return dict(judged)
