"""Server-sent events for both routes, made from the finished response.

The opening events go out at once, the rest when the generation is done. The token fields travel once: on the
items of the last event (Responses), or in the delta that carries `finish_reason` (Chat Completions).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

from pydantic_core import to_json

from backends.ids import new_id
from backends.server.chat import chat_completion
from backends.server.errors import Problem
from gym_sdk.schema import (
    TOKEN_FIELDS,
    FunctionCall,
    Item,
    Message,
    OutputText,
    Reasoning,
    Response,
    ResponseError,
    ResponseRequest,
    TextPart,
    TokenForm,
)

__all__ = ["KEEP_ALIVE", "ChatEvents", "Events", "ResponseEvents"]

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip; it keeps proxies from closing a quiet connection."""

_TERMINAL = {"completed": "response.completed", "incomplete": "response.incomplete"}


class Events(Protocol):
    """Turns one model call into the bytes of a stream."""

    @property
    def response_id(self) -> str:
        """The id that the response will have."""
        ...

    def opening(self) -> bytes:
        """Return what goes out before anything is generated."""
        ...

    def closing(self, response: Response) -> bytes:
        """Return the rest of the stream for a response with this stream's id; it takes the stream's time."""
        ...

    def failure(self, problem: Problem) -> bytes:
        """Return the rest of the stream for a call that failed after the opening."""
        ...


class ResponseEvents:
    """The events of `POST /v1/responses`.

    Args:
        request: what was asked.
        model: the model's name.
        form: where the last event carries the tokens.
    """

    def __init__(self, request: ResponseRequest, model: str, form: TokenForm = "item") -> None:
        self.response_id = new_id("resp")
        self._number = 0
        self._form: TokenForm = form
        self._start = Response.model_construct(
            id=self.response_id,
            created_at=time.time(),
            model=model,
            status="in_progress",
            output=[],
            usage=None,
            error=None,
            incomplete_details=None,
            instructions=request.instructions,
            metadata=request.metadata or {},
            parallel_tool_calls=True,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            max_output_tokens=request.max_output_tokens,
            previous_response_id=request.previous_response_id,
        )

    def opening(self) -> bytes:
        """Return `response.created` and `response.in_progress`."""
        response = self._start.to_wire()
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def closing(self, response: Response) -> bytes:
        """Return the items' events and `response.completed`, `.incomplete` or `.failed`."""
        response.created_at = self._start.created_at
        events = [
            event for index, item in enumerate(response.output) for event in self._item_events(index, item)
        ]
        kind = _TERMINAL.get(response.status)
        wire = response.in_form(self._form)
        if kind is None:
            error = ResponseError(code="server_error", message=f"the generation was {response.status}")
            kind, wire = "response.failed", {**wire, "status": "failed", "error": error.to_wire()}
        return b"".join([*events, self._event(kind, response=wire)])

    def failure(self, problem: Problem) -> bytes:
        """Return `response.failed`."""
        # The codes of this object are a closed set; the message says the rest.
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        error = {"code": code, "message": problem.message}
        response = {**self._start.to_wire(), "status": "failed", "error": error}
        return self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item_events(self, index: int, item: Item) -> Iterator[bytes]:
        done = item.without_tokens().to_wire()
        blank: dict[str, Any] = {
            name: empty for name, empty in (("content", []), ("arguments", "")) if name in done
        }
        begun = {**done, "status": "in_progress", **blank}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        place = {"item_id": done.get("id"), "output_index": index}
        if isinstance(item, FunctionCall):
            prefix = "response.function_call_arguments"
            if item.arguments:
                yield self._event(f"{prefix}.delta", **place, delta=item.arguments)
            yield self._event(f"{prefix}.done", **place, name=item.name, arguments=item.arguments)
        elif isinstance(item, Message | Reasoning) and isinstance(item.content, list):
            for number, part in enumerate(item.content):
                if isinstance(part, OutputText | TextPart):
                    yield from self._text_events({**place, "content_index": number}, part)
        yield self._event("response.output_item.done", output_index=index, item=done)

    def _text_events(self, place: dict[str, Any], part: OutputText | TextPart) -> Iterator[bytes]:
        is_output = isinstance(part, OutputText)
        prefix = "response.output_text" if is_output else "response.reasoning_text"
        extra: dict[str, Any] = {"logprobs": []} if is_output else {}
        whole = part.to_wire()
        yield self._event("response.content_part.added", **place, part={**whole, "text": ""})
        if part.text:
            yield self._event(f"{prefix}.delta", **place, delta=part.text, **extra)
        yield self._event(f"{prefix}.done", **place, text=part.text, **extra)
        yield self._event("response.content_part.done", **place, part=whole)


class ChatEvents:
    """The chunks of `POST /v1/chat/completions`.

    Args:
        model: the model's name.
        include_usage: whether a last chunk carries the usage.
    """

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        self.response_id = new_id("resp")
        self._created_at = time.time()
        self._include_usage = include_usage
        self._head = {
            "id": self.response_id.replace("resp_", "chatcmpl-", 1),
            "object": "chat.completion.chunk",
            "created": int(self._created_at),
            "model": model,
        }

    def opening(self) -> bytes:
        """Return the chunk that names the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def closing(self, response: Response) -> bytes:
        """Return the deltas, the finish reason with the token fields, the usage and `[DONE]`."""
        response.created_at = self._created_at
        completion = chat_completion(response)
        choice = completion["choices"][0]
        message = choice["message"]
        chunks = [
            self._chunk({name: message[name]})
            for name in ("reasoning_content", "content")
            if message.get(name)
        ]
        for index, call in enumerate(message.get("tool_calls", ())):
            chunks.append(self._chunk({"tool_calls": [{"index": index, **call}]}))
        tokens = {name: message[name] for name in TOKEN_FIELDS if name in message}
        chunks.append(self._chunk(tokens, choice["finish_reason"]))
        if self._include_usage:
            chunks.append(_data({**self._head, "choices": [], "usage": completion["usage"]}))
        return b"".join([*chunks, b"data: [DONE]\n\n"])

    def failure(self, problem: Problem) -> bytes:
        """Return an error object, which the openai package raises."""
        return _data({"error": problem.to_wire()})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        usage = {"usage": None} if self._include_usage else {}
        return _data({**self._head, "choices": [choice], **usage})


def _data(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
