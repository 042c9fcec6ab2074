"""The wire contract of the token fields: what a bundle must look like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gym_sdk.errors import TokenContractError

__all__ = ["WeightSpan", "check_generation", "check_ids", "check_token_bundle"]

# fp32 log-softmax of a certain token rounds to a few ulp above zero on some kernels.
_MAX_LOG_PROB = 1e-4


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Positions `start <= i < end` that were sampled by one version of the weights.

    Positions count generated tokens in a model call, and row positions in a `TokenSequence`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    version: str
    start: int
    end: int


def check_token_bundle(
    prompt_token_ids: Sequence[int] | None,
    generation_token_ids: Sequence[int] | None,
    generation_log_probs: Sequence[float] | None,
    weight_versions: Sequence[WeightSpan] | None = None,
) -> None:
    """Check the wire contract of the token fields: all three or none, and consistent.

    A log-prob of -inf is refused with NaN and positive ones: a token of probability 0 cannot be sampled, JSON
    has no infinity, and the importance ratio of such a token is infinite.

    Raises:
        TokenContractError: naming the field at fault.
    """
    fields = {
        "prompt_token_ids": prompt_token_ids,
        "generation_token_ids": generation_token_ids,
        "generation_log_probs": generation_log_probs,
    }
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        present = [name for name in fields if name not in missing]
        if present or weight_versions:
            raise TokenContractError(
                f"partial token bundle: {', '.join(missing)} missing beside "
                f"{', '.join(present) or 'weight_versions'}; send all three or none"
            )
        return
    assert prompt_token_ids is not None
    assert generation_token_ids is not None
    assert generation_log_probs is not None
    check_ids(prompt_token_ids, "prompt_token_ids")
    check_generation(generation_token_ids, generation_log_probs, weight_versions or ())


def check_ids(token_ids: Sequence[int], field: str) -> None:
    """Check that no id is negative.

    Raises:
        TokenContractError: naming `field`.
    """
    if token_ids and min(token_ids) < 0:
        raise TokenContractError(f"{field} holds a negative id")


def check_generation(
    token_ids: Sequence[int], log_probs: Sequence[float], weight_versions: Sequence[WeightSpan]
) -> None:
    """Check the fields of a generation: as long as each other, possible, and spans that cover it.

    Raises:
        TokenContractError: naming the field at fault.
    """
    count = len(token_ids)
    if len(log_probs) != count:
        raise TokenContractError(
            f"generation_log_probs has {len(log_probs)} entries for "
            f"{count} generation_token_ids; there must be one for each sampled token"
        )
    check_ids(token_ids, "generation_token_ids")
    if not all(map(math.isfinite, log_probs)) or max(log_probs, default=0.0) > _MAX_LOG_PROB:
        for index, value in enumerate(log_probs):
            if -math.inf < value <= _MAX_LOG_PROB:  # NaN compares false
                continue
            raise TokenContractError(
                f"generation_log_probs[{index}] is {value}; the natural-log probability of a sampled token "
                "is finite and at most 0"
            )
    position = 0
    for span in weight_versions:
        if span.start != position or span.end < span.start:
            raise TokenContractError(
                f"weight_versions must cover the generation in order: span {span.version!r} "
                f"is [{span.start}, {span.end}) but position {position} is next"
            )
        position = span.end
    if weight_versions and position != count:
        raise TokenContractError(
            f"weight_versions cover {position} of {count} generated tokens; they must cover all"
        )
