"""What a loss maximises at each token, given the probability ratio and the advantage."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["cispo_surrogate", "clipped_surrogate"]


def clipped_surrogate(
    ratio: Float[Tensor, "rows seq"],
    advantages: Float[Tensor, "rows seq"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, "rows seq"]:
    """Compute PPO's clipped objective at each token.

    `J_t = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)` (arXiv 1707.06347, eq. 7; separate
    ranges: DAPO, arXiv 2503.14476, eq. 8). With `dual_clip` c, where A_t < 0: `max(J_t, c A_t)` (arXiv
    1912.09729). Where a clip is active the gradient is 0.

    Args:
        ratio: with gradient, from `token_ratio` or `sequence_ratio`.
        advantages: of each token.
        clip_low: lower range.
        clip_high: upper range.
        dual_clip: greatest ratio that counts where the advantage is negative, above 1.
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return surrogate
    return torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)


def cispo_surrogate(
    ratio: Float[Tensor, "rows seq"],
    advantages: Float[Tensor, "rows seq"],
    log_probs: Float[Tensor, "rows seq"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "rows seq"]:
    """Compute CISPO's objective at each token: a log-prob weighted by its clipped ratio.

    `J_t = sg[clip(r_t, 1 - clip_low, 1 + clip_high)] A_t log_probs_t` (arXiv 2506.13585, eqs. 4 and 5), where
    sg stops the gradient. Every token keeps a gradient; the value by itself says little.

    Args:
        ratio: from `token_ratio` or `sequence_ratio`.
        advantages: of each token.
        log_probs: of the policy being trained, with gradient.
        clip_low: lower range; 1 for no lower bound, as the paper has it.
        clip_high: upper range.
    """
    return ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * log_probs
