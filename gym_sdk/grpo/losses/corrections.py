"""Constant weights for what the sampler and the trainer disagree on."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gym_sdk.grpo.losses.ratios import log_ratio, masked_mean

__all__ = ["DEFAULT_BOUNDS", "WEIGHTING", "Correction", "CorrectionName", "correction_weights"]

CorrectionName = Literal[
    "none", "token_tis", "sequence_tis", "icepop", "sequence_mis", "sequence_mask", "geometric_mask"
]

DEFAULT_BOUNDS: dict[CorrectionName, tuple[float, float]] = {
    "none": (0.0, math.inf),
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_mis": (0.0, 3.0),
    "sequence_mask": (0.5, 2.0),
    "geometric_mask": (0.999, 1.001),
}

WEIGHTING: frozenset[CorrectionName] = frozenset({"token_tis", "sequence_tis", "icepop", "sequence_mis"})
"""The corrections that multiply the loss by the ratio itself; the others multiply it by 0 or 1."""


class Correction(NamedTuple):
    """The weight of each token, and what the bounds did to it."""

    weights: Float[Tensor, "rows seq"]
    """What each token's surrogate is multiplied by; without gradient."""
    truncated: Bool[Tensor, "rows seq"]
    """Tokens with loss whose weight was moved to a bound."""
    masked: Bool[Tensor, "rows seq"]
    """Tokens with loss whose weight is 0."""


@torch.no_grad()
def correction_weights(
    proximal_log_probs: Float[Tensor, "rows seq"],
    behaviour_log_probs: Float[Tensor, "rows seq"],
    loss_mask: Bool[Tensor, "rows seq"],
    *,
    correction: CorrectionName,
    low: float,
    high: float,
    on_policy: Bool[Tensor, "rows seq"] | None = None,
) -> Correction:
    """Compute the weights that correct for tokens drawn from another policy than the trainer's.

    With `w_t = exp(proximal_t - behaviour_t)`, its product W and its geometric mean G over the row's tokens
    with loss:

    - `token_tis`: `w_t` clamped to [low, high] (truncated importance sampling; Yao et al., "Your efficient RL
      framework secretly brings you off-policy RL training", 2025). With high = infinity this is the
      importance weight of the decoupled objective (arXiv 2110.00641).
    - `sequence_tis`: W clamped to [low, high], for each token of the row (Liu, Li et al., "When speed kills
      stability", 2025).
    - `icepop`: `w_t` where it lies in [low, high], else 0 (Ling team, "Small leak can sink a great ship",
      2025; arXiv 2510.18855).
    - `sequence_mis`: W where it lies in [low, high], else 0 (masked importance sampling; Liu, Li et al.).
    - `sequence_mask`: 1 where W lies in [low, high], else 0 (rejection of rows).
    - `geometric_mask`: 1 where G lies in [low, high], else 0 (the same for rows of any length).

    Masks judge by the tokens that the trainer's weights sampled themselves (`on_policy`): there, a ratio away
    from 1 is a fault of the engine. On tokens of older weights it is what training did since: W and G leave
    these tokens out where they decide on a mask, and `icepop` truncates their weights at high instead of
    masking them. A row without a token to judge by is not masked.

    Log-ratios are clamped to ±20, by token and by row. Masked tokens stay in the loss's normaliser, so a mask
    makes the update smaller, not the rest of it larger.

    Args:
        proximal_log_probs: the trainer's, before the step's first update; finite outside the mask too.
        behaviour_log_probs: the sampler's; finite outside the mask too.
        loss_mask: the tokens of each row that count.
        correction: which of the above; "none" weighs every token 1.
        low: lower bound.
        high: upper bound.
        on_policy: the tokens that were sampled by the weights which `proximal_log_probs` are of; None: all.

    Returns:
        Weights and what was truncated or masked. Where a log-prob with loss is NaN, so is the weight.
    """
    difference = log_ratio(proximal_log_probs, behaviour_log_probs)
    nowhere = torch.zeros_like(loss_mask)
    if correction == "none":
        return Correction(torch.ones_like(difference), nowhere, nowhere)
    judging = loss_mask if on_policy is None else loss_mask & on_policy
    judged = difference
    if correction in ("sequence_tis", "sequence_mis", "sequence_mask"):
        difference, judged = _row_sum(difference, loss_mask), _row_sum(difference, judging)
    elif correction == "geometric_mask":
        judged = masked_mean(difference, judging).expand_as(difference)
    weights = difference.exp()
    if correction in ("token_tis", "sequence_tis"):
        truncated = loss_mask & ((weights < low) | (weights > high))
        return Correction(weights.clamp(low, high), truncated, nowhere)
    judgement = judged.exp()
    masked = (judging if correction == "icepop" else loss_mask) & ((judgement < low) | (judgement > high))
    if correction not in WEIGHTING:
        weights = weights / weights  # 1, but NaN where it was NaN: a mask must not hide a bad log-prob
    truncated = loss_mask & ~masked & (weights > high)
    return Correction(weights.clamp(max=high).masked_fill(masked, 0.0), truncated, masked)


def _row_sum(log_ratios: Tensor, mask: Tensor) -> Tensor:
    """Sum up each row's log-ratios where the mask is set, clamped; the same for all tokens of the row."""
    total = log_ratios.where(mask, 0.0).sum(-1, keepdim=True)
    return log_ratio(total, torch.zeros_like(total)).expand_as(log_ratios)
