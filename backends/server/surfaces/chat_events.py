"""The chunks of a streamed chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends.server.errors import Problem
from backends.server.sse import KEEP_ALIVE
from backends.server.surfaces.chat_completion import (
    Shown,
    call_to_wire,
    completion_head,
    shown_log_probs,
    shown_token_ids,
)
from backends.server.surfaces.completion_object import (
    DONE,
    data_event,
    ending_of,
    fingerprint,
    usage_of,
)
from backends.server.unfolding import ArgumentsGrown, Change, TextGrown, Unfolding
from backends.snapshots import Snapshot
from gym_sdk.schema import Message, Response, tokens_to_wire

__all__ = ["ChatEvents"]


class ChatEvents:
    """The chunks of `POST /v1/chat/completions`. A choice's token fields travel in its last delta.

    Args:
        shown: what else the choices show of their tokens; what is named by id comes in the last delta.
        include_usage: whether a last chunk carries the usage.
    """

    def __init__(self, shown: Shown | None = None, *, include_usage: bool = False) -> None:
        self._include_usage = include_usage
        self._shown = shown or Shown()
        self._head: dict[str, Any] = {}
        self._choices: list[_Choice] = []
        self._done: dict[int, Response] = {}

    keep_alive = KEEP_ALIVE

    def opening(self, responses: Sequence[Response]) -> bytes:
        """Return the chunks that name the choices' roles."""
        self._head = completion_head(responses[0], "chat.completion.chunk")
        self._choices = [_Choice() for _ in responses]
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(choice, delta) for choice in range(len(responses)))

    def progress(self, choice: int, snapshot: Snapshot) -> bytes:
        """Return the deltas, and at the end the finish reason with the token fields."""
        chunks = []
        for change in self._choices[choice].unfolding.take(snapshot):
            delta = self._choices[choice].delta(change)
            if delta is not None:
                chunks.append(self._chunk(choice, delta, log_probs=_log_probs_of(change)))
        if snapshot.done:
            response = self._done[choice] = snapshot.response
            delta = {} if response.tokens is None else tokens_to_wire(response.tokens)
            ending = ending_of(response) | shown_token_ids(response, self._shown)
            scores = shown_log_probs(response, self._shown) if self._shown.as_ids else None
            entries = () if scores is None else scores["content"]
            version = fingerprint(response)
            chunks.append(self._chunk(choice, delta, ending, log_probs=entries, version=version))
        return b"".join(chunks)

    def closing(self) -> bytes:
        """Return the usage and `[DONE]`."""
        if not self._include_usage:
            return DONE
        responses = [response for _, response in sorted(self._done.items())]
        head = {**self._head, "system_fingerprint": fingerprint(responses[-1])}
        return (
            data_event({**head, "choices": [], "usage": usage_of(responses, choices=len(responses))}) + DONE
        )

    def failure(self, problem: Problem) -> bytes:
        """Return an error object, which the openai package raises."""
        return data_event({"error": problem.to_wire()})

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        ending: dict[str, Any] | None = None,
        *,
        log_probs: Sequence[Any] = (),
        version: str | None = None,
    ) -> bytes:
        scores = (
            {"content": list(log_probs), "refusal": None} if self._shown.log_probs and log_probs else None
        )
        body = {
            "index": choice,
            "delta": delta,
            "logprobs": scores if self._shown.log_probs and log_probs else None,
            **(ending or {"finish_reason": None}),
        }
        usage = {"usage": None} if self._include_usage else {}
        # which weights sample the answer is not known before it has ended
        return data_event({**self._head, "system_fingerprint": version, "choices": [body], **usage})


class _Choice:
    """What one choice has said so far."""

    def __init__(self) -> None:
        self.unfolding = Unfolding()
        self._calls = 0

    def delta(self, change: Change) -> dict[str, Any] | None:
        """Return what a change adds to the message; None if nothing."""
        if isinstance(change, TextGrown) and (change.delta or change.log_probs):
            return {"content" if isinstance(change.item, Message) else "reasoning_content": change.delta}
        if isinstance(change, ArgumentsGrown):
            self._calls += 1
            return {"tool_calls": [{"index": self._calls - 1, **call_to_wire(change.item)}]}
        return None


def _log_probs_of(change: Change) -> Sequence[Any]:
    return change.log_probs if isinstance(change, TextGrown) else ()
