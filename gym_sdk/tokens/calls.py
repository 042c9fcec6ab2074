"""The tokens of one model call: what was prompted, what was sampled, and how likely it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gym_sdk.errors import TokenContractError

__all__ = ["CallTokens", "WeightSpan", "check_token_bundle"]

# fp32 log-softmax of a certain token rounds to a few ulp above zero on some kernels.
_MAX_LOG_PROB = 1e-4


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Positions `start <= i < end` that were sampled by one version of the weights.

    Positions count generated tokens in a model call, and row positions in a `TokenSequence`.
    """

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CallTokens:
    """The exact tokens of one prompt-to-generation round trip.

    Attributes:
        prompt_token_ids: all tokens the policy was conditioned on; length P.
        generation_token_ids: the sampled tokens, the stop token included; length G.
        generation_log_probs: natural-log probability of each sampled token under the sampling
            distribution at the request's temperature, before top-k/top-p truncation; length G.
            Greedy decoding reports temperature 1.
        weight_versions: spans over the G generated tokens, in order, without gaps or overlap; empty
            if the engine does not report them.

    Raises:
        TokenContractError: lengths disagree, an id is negative, or a log-prob is NaN or positive.
    """

    prompt_token_ids: list[int]
    generation_token_ids: list[int]
    generation_log_probs: list[float]
    weight_versions: tuple[WeightSpan, ...] = ()

    def __post_init__(self) -> None:
        check_token_bundle(
            self.prompt_token_ids,
            self.generation_token_ids,
            self.generation_log_probs,
            self.weight_versions,
        )

    @property
    def token_ids(self) -> list[int]:
        """Prompt and generation, in one list of length P + G."""
        return self.prompt_token_ids + self.generation_token_ids


def check_token_bundle(
    prompt_token_ids: Sequence[int] | None,
    generation_token_ids: Sequence[int] | None,
    generation_log_probs: Sequence[float] | None,
    weight_versions: Sequence[WeightSpan] | None = None,
) -> None:
    """Check the wire contract of the token fields: all three or none, and consistent.

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
    count = len(generation_token_ids)
    if len(generation_log_probs) != count:
        raise TokenContractError(
            f"generation_log_probs has {len(generation_log_probs)} entries for "
            f"{count} generation_token_ids; there must be one for each sampled token"
        )
    if prompt_token_ids and min(prompt_token_ids) < 0:
        raise TokenContractError("prompt_token_ids holds a negative id")
    if generation_token_ids and min(generation_token_ids) < 0:
        raise TokenContractError("generation_token_ids holds a negative id")
    for index, value in enumerate(generation_log_probs):
        if math.isnan(value) or value > _MAX_LOG_PROB:
            raise TokenContractError(
                f"generation_log_probs[{index}] is {value}; a natural-log probability is at most 0"
            )
    position = 0
    for span in weight_versions or ():
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
