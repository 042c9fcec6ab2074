"""`POST /v1/responses`: OpenAI's events, each with its type and a sequence number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from backends.requests import refuse, wants_log_probs
from backends.server.errors import Problem
from backends.server.sse import KEEP_ALIVE
from backends.server.surfaces.surface import Asked, stream_options
from backends.server.unfolding import (
    ArgumentsGrown,
    Change,
    ItemBegun,
    ItemEnded,
    PartBegun,
    PartEnded,
    TextGrown,
    Unfolding,
)
from backends.snapshots import Snapshot
from gym_sdk.schema import (
    CustomToolCall,
    FunctionCall,
    Item,
    OutputText,
    Response,
    ResponseError,
    ResponseRequest,
    TokenForm,
)

__all__ = ["ResponseEvents", "ResponsesSurface"]

_TERMINAL = {"completed": "response.completed", "incomplete": "response.incomplete"}
_DONE = b"data: [DONE]\n\n"


class ResponsesSurface:
    """Reads and writes the Responses API."""

    name = "responses"
    has_forms = True

    def read(self, body: dict[str, Any], *, model: str, form: TokenForm) -> Asked:
        """Read a request's body; see `Surface.read`."""
        options = stream_options(body, "include_obfuscation")
        if options.get("include_obfuscation"):
            raise refuse("stream_options.include_obfuscation", "streams are not obfuscated here")
        request = ResponseRequest.model_validate(body)
        streams, background = bool(request.stream), bool(request.background)
        request.store = request.store is not False
        if background and not request.store:
            raise refuse("background", "what runs in the background is found by its id: `store` must be true")
        request.stream = None
        return Asked(
            [request],
            lambda responses: responses[0].in_form(form),
            ResponseEvents(form, log_probs=wants_log_probs(request)) if streams else None,
            inherit=form == "compact",
            store=request.store,
            background=background,
        )


class ResponseEvents:
    """The events of `POST /v1/responses`. The token fields travel once, in the last one.

    Args:
        form: where the last event carries the tokens.
        log_probs: whether the events of texts carry log-probs.
    """

    def __init__(self, form: TokenForm = "item", *, log_probs: bool = False) -> None:
        self._number = 0
        self._form: TokenForm = form
        self._log_probs = log_probs
        self._unfolding = Unfolding()
        self._response: Response | None = None

    keep_alive = KEEP_ALIVE

    def opening(self, responses: Sequence[Response]) -> bytes:
        """Return `response.created` and `response.in_progress`."""
        self._response = responses[0]
        response = self._response.in_form(self._form)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def progress(self, choice: int, snapshot: Snapshot) -> bytes:
        """Return the events of what is new; the last is `response.completed`, `.incomplete` or `.failed`."""
        events = [self._change(change) for change in self._unfolding.take(snapshot)]
        self._response = snapshot.response
        if snapshot.done:
            events.append(self._ended(snapshot.response))
        return b"".join(events)

    def closing(self) -> bytes:
        """Return `[DONE]`."""
        return _DONE

    def failure(self, problem: Problem) -> bytes:
        """Return `response.failed` and `[DONE]`."""
        assert self._response is not None
        # The codes of this object are a closed set; the message says the rest.
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        error = {"code": code, "message": problem.message}
        response = {**self._response.in_form(self._form), "status": "failed", "error": error}
        return self._event("response.failed", response=response) + _DONE

    def _ended(self, response: Response) -> bytes:
        kind = _TERMINAL.get(response.status)
        wire = response.in_form(self._form)
        if kind is None:
            error = ResponseError(code="server_error", message=f"the generation was {response.status}")
            kind, wire = "response.failed", {**wire, "status": "failed", "error": error.to_wire()}
        return self._event(kind, response=wire)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _change(self, change: Change) -> bytes:
        place: dict[str, Any] = {"output_index": change.index}
        match change:
            case ItemBegun():
                return self._event("response.output_item.added", **place, item=_blank(change.item))
            case ItemEnded():
                item = change.item.without_tokens().to_wire()
                return self._whole_call(change) + self._event("response.output_item.done", **place, item=item)
            case ArgumentsGrown():
                place["item_id"] = change.item.id
                return self._event(f"{_prefix_of(change.item)}.delta", **place, delta=change.delta)
        place |= {"item_id": getattr(change.item, "id", None), "content_index": change.part_index}
        prefix = "response.output_text" if isinstance(change.part, OutputText) else "response.reasoning_text"
        match change:
            case PartBegun():
                part = change.part.to_wire() | {"text": ""} | ({"logprobs": []} if self._log_probs else {})
                return self._event("response.content_part.added", **place, part=part)
            case TextGrown():
                extra = {"logprobs": change.log_probs} if isinstance(change.part, OutputText) else {}
                return self._event(f"{prefix}.delta", **place, delta=change.delta, **extra)
            case PartEnded():
                extra = (
                    {"logprobs": change.part.logprobs or []} if isinstance(change.part, OutputText) else {}
                )
                text = self._event(f"{prefix}.done", **place, text=change.part.text, **extra)
                return text + self._event("response.content_part.done", **place, part=change.part.to_wire())

    def _whole_call(self, change: ItemEnded) -> bytes:
        item = change.item
        if not isinstance(item, FunctionCall | CustomToolCall):
            return b""
        fields = {"item_id": item.id, "output_index": change.index}
        if isinstance(item, CustomToolCall):
            return self._event(f"{_prefix_of(item)}.done", **fields, input=item.input)
        return self._event(f"{_prefix_of(item)}.done", **fields, name=item.name, arguments=item.arguments)


def _prefix_of(item: FunctionCall | CustomToolCall) -> str:
    what = "function_call_arguments" if isinstance(item, FunctionCall) else "custom_tool_call_input"
    return f"response.{what}"


def _blank(item: Item) -> dict[str, Any]:
    """Return an item as it is before anything of it is known."""
    wire = item.without_tokens().to_wire()
    empty = {"content": [], "arguments": "", "input": ""}
    wire |= {name: value for name, value in empty.items() if name in wire}
    wire.pop("encrypted_content", None)
    return wire | {"status": "in_progress"}
