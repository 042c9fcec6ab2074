"""What SGLang's `/generate` answers, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from backends.engine import FinishReason, TopLogProbs
from backends.sglang.client import refusal
from gym_sdk.errors import GymError, TokenContractError, TransportError
from gym_sdk.tokens import WeightSpan
from gym_sdk.tokens.bundle import check_generation

__all__ = ["Answer", "likeliest", "read_answer"]

_IMPOSSIBLE = -1e30
"""SGLang writes -3.4e38 for minus infinity."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All tokens of a generation so far.

    Attributes:
        token_ids: the G sampled tokens.
        log_probs: G natural-log probabilities.
        version: the label that SGLang's HTTP process had when it sent this; in a running stream it may be
            newer than what sampled the tokens.
        spans: the versions that sampled the tokens; None until the end of a stream.
        finish_reason: why it ended; None while it runs.
        stop_id: the stop token that ended it.
        cached_tokens: how many prompt tokens did not need computing.
        top_log_probs: the likeliest tokens at each of the G places; None if none were asked for.
    """

    token_ids: list[int]
    log_probs: list[float]
    version: str
    spans: tuple[WeightSpan, ...] | None
    finish_reason: FinishReason | None
    stop_id: int | None
    cached_tokens: int
    top_log_probs: TopLogProbs | None


def read_answer(body: Mapping[str, Any], *, vocab_size: int, reported: bool = False) -> Answer:
    """Read and check one answer, or one event of a stream.

    Args:
        body: the answer.
        vocab_size: how many ids the model knows.
        reported: whether the likeliest tokens were asked for.

    Raises:
        TokenContractError: its tokens, log-probs and weight versions contradict each other.
        TransportError: it has not the shape of an answer, or SGLang gave the request up.
        PolicyError: SGLang refused the request after it had taken it.
        GymError: the model's logits were not finite.
    """
    if "error" in body:
        error = body["error"]
        code = error.get("code") if isinstance(error, Mapping) else None
        raise refusal("/generate", code if isinstance(code, int) else 400, str(_said(error)))
    try:
        meta = body["meta_info"]
        finish_reason, stop_id = _finish(meta["finish_reason"])
        token_ids = list(body["output_ids"])
        entries = meta.get("output_token_logprobs") or ()
        scored = [entry[1] for entry in entries]
        answer = Answer(
            token_ids=token_ids,
            log_probs=[float(entry[0]) for entry in entries],
            version=str(meta["weight_version"]),
            spans=_spans(meta, len(token_ids)) if finish_reason is not None else None,
            finish_reason=finish_reason,
            stop_id=stop_id,
            cached_tokens=int(meta.get("cached_tokens") or 0),
            top_log_probs=likeliest(meta.get("output_top_logprobs") or ()) if reported else None,
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, GymError):
            raise
        text = str(body)[:300]
        raise TransportError(
            f"SGLang's /generate answered with no generation ({type(error).__name__}: {error}): {text}",
            retryable=False,
        ) from error
    _check(answer, scored, vocab_size)
    return answer


def likeliest(places: Iterable[Iterable[Any]]) -> TopLogProbs:
    """Read what SGLang says about the likeliest tokens of some places."""
    return [[(int(e[1]), float(e[0])) for e in place if e[0] > _IMPOSSIBLE] for place in places]


def _said(error: object) -> object:
    return error.get("message", error) if isinstance(error, Mapping) else error


def _finish(reason: Mapping[str, Any] | None) -> tuple[FinishReason | None, int | None]:
    if reason is None:
        return None, None
    kind = reason["type"]
    if kind == "stop":
        matched = reason.get("matched")
        if not isinstance(matched, int):
            # no stop strings are ever sent: this is how SGLang ends a request with NaN among its logits
            raise GymError(f"SGLang ended the generation with {matched!r}: the model's logits are not finite")
        return FinishReason.STOP, matched
    if kind == "abort":
        status = reason.get("status_code")
        if status is not None:
            raise refusal("/generate", int(status), str(reason.get("message")))
        return FinishReason.ABORT, None
    return FinishReason(kind), None


def _spans(meta: Mapping[str, Any], count: int) -> tuple[WeightSpan, ...]:
    if not count:
        return ()
    spans = meta.get("weight_versions")
    if not spans:
        raise TokenContractError("SGLang reports no weight_versions for a generation; is it too old?")
    return tuple(WeightSpan(str(span["version"]), int(span["start"]), int(span["end"])) for span in spans)


def _check(answer: Answer, scored: list[int], vocab_size: int) -> None:
    if scored != answer.token_ids:
        raise TokenContractError(
            f"SGLang sampled {len(answer.token_ids)} tokens and reports log-probs of {len(scored)} others"
        )
    if answer.top_log_probs is not None and len(answer.top_log_probs) != len(answer.token_ids):
        raise TokenContractError(
            f"SGLang sampled {len(answer.token_ids)} tokens and reports the likeliest tokens of "
            f"{len(answer.top_log_probs)} places"
        )
    if answer.token_ids and max(answer.token_ids) >= vocab_size:
        raise TokenContractError(f"SGLang sampled an id outside the vocabulary of {vocab_size} ids")
    if not all(map(math.isfinite, answer.log_probs)):
        raise TokenContractError("SGLang reports a log-prob that is not finite")
    check_generation(answer.token_ids, answer.log_probs, answer.spans or ())
    if answer.stop_id is not None and answer.token_ids[-1:] != [answer.stop_id]:
        raise TokenContractError(
            f"SGLang says that the token {answer.stop_id} ended the generation, which ends otherwise"
        )
