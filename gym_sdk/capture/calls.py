"""What the server recorded of each model call, and how it travels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gym_sdk.errors import TransportError
from gym_sdk.schema import Item, Usage
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = ["CallError", "CapturePage", "CapturedCall", "RecordedCall", "restore"]


class CallError(BaseModel):
    """Why a call was refused or failed."""

    error: str
    """Class name of the server's error."""
    message: str
    status: int
    """The HTTP status that stands for it."""
    code: str | None = None
    """OpenAI's error code."""
    param: str | None = None
    """The request field at fault."""


@dataclass(slots=True)
class CapturedCall:
    """One model call that an agent made, whether it succeeded or not.

    Attributes:
        number: position in order of arrival, from 0.
        route: `responses`, `chat/completions`, `completions` or `messages`.
        status: `completed`, `incomplete`, `cancelled` (the agent went away, or the capture ended), `refused`
            (4xx) or `failed` (5xx).
        started_at: Unix time, in seconds.
        duration_s: from the request's arrival to the end of its generation.
        instructions: the request's `instructions`.
        input: the request's items, without token fields; after the history that `previous_response_id` names.
        sampling: the request's `temperature`, `top_p`, `top_k`, `max_output_tokens` and `seed`, if set.
        response_id: the response's id, if there was a response.
        output: the output items, without token fields.
        tokens: what was prompted and sampled.
        usage: token counts.
        fork: why the prompt did not extend the history's newest model call, if it did not.
        unparsed_calls: pieces of tool-call markup that did not parse.
        error: why the call was refused or failed.
    """

    number: int
    route: str
    status: str
    started_at: float
    duration_s: float
    instructions: str | None = None
    input: list[Item] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    response_id: str | None = None
    output: list[Item] = field(default_factory=list)
    tokens: CallTokens | None = None
    usage: Usage | None = None
    fork: str | None = None
    unparsed_calls: int = 0
    error: CallError | None = None


class RecordedCall(BaseModel):
    """A call as it travels: what it shares with earlier calls stands there only once."""

    model_config = ConfigDict(extra="ignore", defer_build=True)

    number: int
    route: str
    status: str
    started_at: float
    duration_s: float
    instructions: str | None = None
    previous_response_id: str | None = None
    """The response whose history stands before the input."""
    input_base: tuple[int, int] | None = None
    """An earlier call, and how many of its request's items this request's begin with."""
    input: list[Item] = Field(default_factory=list)
    sampling: dict[str, Any] = Field(default_factory=dict)
    response_id: str | None = None
    output: list[Item] = Field(default_factory=list)
    prompt_base: int | None = None
    """An earlier call whose prompt and generation this prompt begins with."""
    prompt_token_ids: list[int] | None = None
    generation_token_ids: list[int] | None = None
    generation_log_probs: list[float] | None = None
    weight_versions: list[WeightSpan] = Field(default_factory=list)
    usage: Usage | None = None
    fork: str | None = None
    unparsed_calls: int = 0
    error: CallError | None = None


class CapturePage(BaseModel):
    """What `GET` and `DELETE /rollouts/{id}` answer."""

    model_config = ConfigDict(extra="ignore", defer_build=True)

    calls: list[RecordedCall]
    next: int
    """What to ask for next: how many calls are known with this page."""
    more: bool = False
    """Whether more calls have finished than are known with this page."""


def restore(records: Iterable[RecordedCall]) -> list[CapturedCall]:
    """Return the calls in order of arrival, each whole.

    Raises:
        TransportError: a record refers to a call that is not there.
        TokenContractError: a call's tokens contradict each other.
    """
    calls: dict[int, CapturedCall] = {}
    asked: dict[int, list[Item]] = {}
    for record in sorted(records, key=lambda entry: entry.number):
        try:
            asked[record.number] = record.input
            if record.input_base is not None:
                number, count = record.input_base
                asked[record.number] = asked[number][:count] + record.input
            calls[record.number] = _whole(record, calls, asked[record.number])
        except KeyError as error:
            raise TransportError(
                f"the capture is incomplete: call {record.number} builds on call {error}, which is missing",
                retryable=False,
            ) from None
    return list(calls.values())


def _whole(record: RecordedCall, calls: dict[int, CapturedCall], asked: list[Item]) -> CapturedCall:
    before: list[Item] = []
    if record.previous_response_id is not None:
        for call in calls.values():
            if call.response_id == record.previous_response_id:
                before = call.input + call.output
    return CapturedCall(
        number=record.number,
        route=record.route,
        status=record.status,
        started_at=record.started_at,
        duration_s=record.duration_s,
        instructions=record.instructions,
        input=before + asked,
        sampling=record.sampling,
        response_id=record.response_id,
        output=record.output,
        tokens=_tokens(record, calls),
        usage=record.usage,
        fork=record.fork,
        unparsed_calls=record.unparsed_calls,
        error=record.error,
    )


def _tokens(record: RecordedCall, calls: dict[int, CapturedCall]) -> CallTokens | None:
    if (
        record.prompt_token_ids is None
        or record.generation_token_ids is None
        or record.generation_log_probs is None
    ):
        return None
    own = (
        record.prompt_token_ids,
        record.generation_token_ids,
        record.generation_log_probs,
        tuple(record.weight_versions),
    )
    if record.prompt_base is None:
        return CallTokens(*own)
    base = calls[record.prompt_base].tokens
    if base is None:
        raise KeyError(record.prompt_base)
    return CallTokens.extending(base, *own)
