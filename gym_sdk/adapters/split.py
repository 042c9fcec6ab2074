"""A training row cut into prompt and completion, which is how most trainers want it."""

from __future__ import annotations

from dataclasses import dataclass

from gym_sdk.errors import TokenContractError
from gym_sdk.tokens import TokenSequence

__all__ = ["SplitRow", "split_row"]


@dataclass(frozen=True, slots=True)
class SplitRow:
    """A row of L tokens: a prompt of P, and a completion of C = L - P.

    Attributes:
        prompt_ids: everything before the first trained token; length P, at least 1.
        completion_ids: the rest: what was sampled, and the tools' tokens between; length C, at least 1.
        completion_mask: 1 where the token was sampled and is trained in this row, else 0; length C.
        completion_log_probs: the sampler's log-prob where `completion_mask` is 1, else 0.0; length C.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[int]
    completion_log_probs: list[float]


def split_row(row: TokenSequence) -> SplitRow | None:
    """Cut a row before its first trained token.

    Returns:
        The two parts, or None if no token of the row is trained.

    Raises:
        TokenContractError: the row's lists differ in length, or its first token is a trained one (nothing
            precedes it, so it was not sampled).
    """
    length = len(row.token_ids)
    if not length == len(row.loss_mask) == len(row.log_probs):
        raise TokenContractError(
            f"a row of rollout {row.rollout_id!r} has {length} tokens, {len(row.loss_mask)} mask entries and "
            f"{len(row.log_probs)} log-probs; it needs the same number of each"
        )
    if not any(row.loss_mask):
        return None
    start = row.loss_mask.index(1)
    if start == 0:
        raise TokenContractError(
            f"a row of rollout {row.rollout_id!r} starts with a sampled token; "
            "a prompt needs at least one token"
        )
    return SplitRow(
        row.token_ids[:start], row.token_ids[start:], row.loss_mask[start:], row.log_probs[start:]
    )
