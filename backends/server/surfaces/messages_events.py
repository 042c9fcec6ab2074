"""The events of `POST /v1/messages`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import to_json

from backends.sealed import seal
from backends.server.errors import Problem, problem_of
from backends.server.surfaces.messages_answer import blank_message, ending_of, usage_of
from backends.server.surfaces.messages_blocks import block_of
from backends.server.unfolding import Change, ItemBegun, ItemEnded, TextGrown, Unfolding
from backends.snapshots import Snapshot
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCall, Message, Reasoning, Response

__all__ = ["MessagesEvents"]


class MessagesEvents:
    """Blocks as they grow. A call's input comes in one piece, when it is known to be an object.

    Args:
        shows_thinking: whether thinking is written out; its signature has it in any case.
    """

    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, *, shows_thinking: bool = True) -> None:
        self._shows_thinking = shows_thinking
        self._unfolding = Unfolding()
        self._index = -1
        self._open = False
        self._calls = False
        self._ended = False

    def opening(self, responses: Sequence[Response]) -> bytes:
        """Return `message_start` and a ping."""
        return _event("message_start", message=blank_message(responses[0])) + self.keep_alive

    def progress(self, choice: int, snapshot: Snapshot) -> bytes:
        """Return the events of what is new in the blocks, and at the end `message_delta` with the tokens."""
        events = [event for change in self._unfolding.take(snapshot) for event in self._change(change)]
        if snapshot.done:
            events.append(self._message_delta(snapshot.response))
        return b"".join(events)

    def closing(self) -> bytes:
        """Return `message_stop`; a stream that ended with an error has none."""
        return _event("message_stop") if self._ended else b""

    def failure(self, problem: Problem) -> bytes:
        """Return the error, which the anthropic package raises."""
        return _event("error", error=problem.to_anthropic())

    def _message_delta(self, response: Response) -> bytes:
        try:
            delta = ending_of(response, calls=self._calls)
        except PolicyError as error:
            return self.failure(problem_of(error))
        self._ended = True
        return _event("message_delta", delta=delta, usage=usage_of(response))

    def _change(self, change: Change) -> Iterator[bytes]:
        match change:
            case ItemBegun(item=Reasoning()):
                yield self._start({"type": "thinking", "thinking": "", "signature": ""})
            case TextGrown(item=Reasoning(), delta=delta) if delta and self._shows_thinking:
                yield self._delta({"type": "thinking_delta", "thinking": delta})
            case TextGrown(item=Message(), delta=delta) if delta:
                if not self._open:  # a message that says nothing is no block
                    yield self._start({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": delta})
            case ItemEnded(item=Reasoning() as item):
                yield self._delta({"type": "signature_delta", "signature": seal(item.text)})
                yield self._stop()
            case ItemEnded(item=FunctionCall() as item):
                yield from self._call(item)
            case ItemEnded() if self._open:
                yield self._stop()

    def _call(self, item: FunctionCall) -> Iterator[bytes]:
        block = block_of(item)
        assert block is not None
        if block["type"] == "text":
            yield self._start({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": block["text"]})
        else:
            self._calls = True
            yield self._start({**block, "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": item.arguments})
        yield self._stop()

    def _start(self, block: dict[str, Any]) -> bytes:
        self._index += 1
        self._open = True
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _stop(self) -> bytes:
        self._open = False
        return _event("content_block_stop", index=self._index)


def _event(kind: str, **fields: Any) -> bytes:
    data = to_json({"type": kind, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
