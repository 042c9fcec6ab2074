"""What a rollout reads of a response; the rest of the body is not parsed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from gym_sdk.errors import TokenContractError
from gym_sdk.schema.base import TOKEN_FIELDS
from gym_sdk.schema.items import Item
from gym_sdk.schema.responses import TOKEN_FORM_HEADER, Response
from gym_sdk.tokens import CallTokens, WeightSpan
from gym_sdk.tokens.bundle import check_token_bundle

__all__ = ["Turn"]

_Status = Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
_Own = tuple[list[int], list[int], list[float], tuple[WeightSpan, ...]]


@dataclass(slots=True)
class Turn:
    """A response, as far as a rollout asks.

    Attributes:
        id: the response's.
        status: `completed`, `incomplete`, or why there is no answer.
        output: its items; a token bundle may sit on one.
        output_tokens: how many tokens were sampled, if that is said.
        problem: why it failed, if it did.
        fork: why the prompt did not extend the newest model call of its history, if it did not.
        unparsed_calls: pieces of tool-call markup that stayed text.
        previous_response_id: the response that it says it continues.
        remembered: whether the next request may continue it.
    """

    id: str
    status: str
    output: list[Item]
    output_tokens: int | None = None
    problem: str | None = None
    fork: str | None = None
    unparsed_calls: int = 0
    previous_response_id: str | None = None
    remembered: bool = False
    _whole: CallTokens | None = None
    _extends: str | None = None
    _delta: _Own | None = None

    @classmethod
    def of(cls, response: Response) -> Turn:
        """Take what counts from a response."""
        delta = response.token_delta
        return cls(
            response.id,
            response.status,
            response.output,
            None if response.usage is None else response.usage.output_tokens,
            None if response.error is None else response.error.message,
            response.fork,
            response.unparsed_calls,
            response.previous_response_id,
            response.remembered,
            None if delta is not None else response.tokens_after({}),
            None if delta is None else delta.extends,
            None if delta is None else delta.own_tokens,
        )

    @classmethod
    def read(cls, body: bytes) -> Turn:
        """Read the body of an answer.

        Raises:
            pydantic.ValidationError: it is no response.
            TokenContractError: its token fields contradict each other.
        """
        fields = _body().validate_json(body)
        usage, error, delta = fields.get("usage"), fields.get("error"), fields.get("token_delta")
        turn = cls(
            fields["id"],
            fields.get("status", "completed"),
            fields["output"],
            None if usage is None else usage["output_tokens"],
            None if error is None else error["message"],
            fields.get("fork"),
            fields.get("unparsed_calls", 0),
            fields.get("previous_response_id"),
            delta is not None,
        )
        if delta is not None:
            turn._extends = delta.get("extends")
            turn._delta = (
                delta["new_prompt_token_ids"],
                delta["generation_token_ids"],
                delta["generation_log_probs"],
                tuple(delta.get("weight_versions") or ()),
            )
        elif not fields.keys().isdisjoint(_TOKENS):
            turn._whole = _bundle(fields)
        if turn._whole is None and delta is None:
            turn._whole = next(
                (item.tokens for item in reversed(turn.output) if item.tokens is not None), None
            )
        return turn

    def tokens_after(self, known: Mapping[str, CallTokens]) -> CallTokens | None:
        """Return the tokens of this model call, given those of earlier responses by response id.

        Raises:
            TokenContractError: the response that these tokens extend is not known, or they contradict each
                other.
        """
        if self._delta is None:
            return self._whole
        if self._extends is None:
            return CallTokens(*self._delta)
        parent = known.get(self._extends)
        if parent is None:
            raise TokenContractError(
                f"token_delta.extends names response {self._extends!r}, whose tokens are not known here; "
                f"ask for whole tokens with the header `{TOKEN_FORM_HEADER}: item`"
            )
        return CallTokens.extending(parent, *self._delta)


def _bundle(fields: _Body) -> CallTokens | None:
    """Return the whole tokens that sit on the response, if they do."""
    prompt, generation = fields.get("prompt_token_ids"), fields.get("generation_token_ids")
    log_probs, spans = fields.get("generation_log_probs"), fields.get("weight_versions")
    check_token_bundle(prompt, generation, log_probs, spans)
    if prompt is None or generation is None or log_probs is None:
        return None
    return CallTokens(prompt, generation, log_probs, tuple(spans or ()))


class _Usage(TypedDict):
    output_tokens: int


class _Error(TypedDict):
    message: str


class _Delta(TypedDict):
    extends: NotRequired[str | None]
    new_prompt_token_ids: list[int]
    generation_token_ids: list[int]
    generation_log_probs: list[float]
    weight_versions: NotRequired[list[WeightSpan] | None]


class _Body(TypedDict):
    id: str
    status: NotRequired[_Status]
    output: list[Item]
    usage: NotRequired[_Usage | None]
    error: NotRequired[_Error | None]
    fork: NotRequired[str | None]
    unparsed_calls: NotRequired[int]
    previous_response_id: NotRequired[str | None]
    token_delta: NotRequired[_Delta | None]
    prompt_token_ids: NotRequired[list[int] | None]
    generation_token_ids: NotRequired[list[int] | None]
    generation_log_probs: NotRequired[list[float] | None]
    weight_versions: NotRequired[list[WeightSpan] | None]


_TOKENS: Final = frozenset(TOKEN_FIELDS)


@functools.cache
def _body() -> TypeAdapter[_Body]:
    return TypeAdapter(_Body)
