"""The policy-gradient loss: clipped, token-level, with a global normaliser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gym_sdk.errors import ConfigurationError

__all__ = ["LossStats", "PolicyLoss", "policy_loss"]

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossStats:
    """Sums and extremes over the tokens with loss; those of micro-batches are added with `+`.

    Attributes:
        tokens: tokens with loss.
        loss: this part's share of the loss.
        ratio: sum of the probability ratios that are clipped.
        ratio_min: least ratio; infinity if there is no token.
        ratio_max: greatest ratio; minus infinity if there is no token.
        clipped_low: tokens whose gradient the lower clip removed.
        clipped_high: tokens whose gradient the upper clip removed.
        kl: sum of the k3 estimates of KL(behaviour || new) (Schulman, "Approximating KL divergence").
        tis_weight: sum of the importance weights; equal to `tokens` without correction.
        tis_capped: tokens whose importance weight reached the cap.
    """

    tokens: float = 0.0
    loss: float = 0.0
    ratio: float = 0.0
    ratio_min: float = math.inf
    ratio_max: float = -math.inf
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    kl: float = 0.0
    tis_weight: float = 0.0
    tis_capped: float = 0.0

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.ratio + other.ratio,
            min(self.ratio_min, other.ratio_min),
            max(self.ratio_max, other.ratio_max),
            self.clipped_low + other.clipped_low,
            self.clipped_high + other.clipped_high,
            self.kl + other.kl,
            self.tis_weight + other.tis_weight,
            self.tis_capped + other.tis_capped,
        )


class PolicyLoss(NamedTuple):
    """The loss to differentiate, and what it was made of."""

    loss: Float[Tensor, ""]
    stats: LossStats


def policy_loss(
    log_probs: Float[Tensor, "rows seq"],
    behaviour_log_probs: Float[Tensor, "rows seq"],
    advantages: Float[Tensor, "rows seq"],
    loss_mask: Bool[Tensor, "rows seq"],
    *,
    normaliser: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    proximal_log_probs: Float[Tensor, "rows seq"] | None = None,
    tis_cap: float | None = None,
) -> PolicyLoss:
    r"""Compute the clipped surrogate, summed over tokens and divided by a given normaliser.

    With the ratio `r_t = exp(log_probs_t - old_t)` and the advantage A_t of each token:

    `loss = -(1 / normaliser) * sum_t w_t * min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)`

    The clipped surrogate is PPO's (arXiv 1707.06347, eq. 7); separate ranges and the mean over all tokens
    of the batch, not of each row, are DAPO's (arXiv 2503.14476, eqs. 8 to 12). `old` are the behaviour
    policy's log-probs and `w_t = 1`. With `proximal_log_probs`, `old` are those instead (decoupled PPO, arXiv
    2110.00641), and with `tis_cap` each token is weighted by the truncated importance ratio
    `w_t = min(exp(proximal_t - behaviour_t), tis_cap)`, which is a constant (Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025). Log-ratios are clamped to ±20 before
    the exponential, so that one absurd token gives a large number, not an infinite one.

    Args:
        log_probs: of the policy being trained, with gradient.
        behaviour_log_probs: of the sampler: the engine's `generation_log_probs`.
        advantages: of each token.
        loss_mask: which tokens count; whatever the others hold is ignored.
        normaliser: what the sum is divided by: the number of tokens with loss in the *whole* minibatch, so
            that losses of its micro-batches add up to exactly the loss of the minibatch.
        clip_low: lower clip range.
        clip_high: upper clip range.
        proximal_log_probs: of the trainer's weights before the first update; None: `behaviour_log_probs`.
        tis_cap: cap of the importance weight; None: no weighting.

    Raises:
        ConfigurationError: the normaliser is not positive, or `tis_cap` comes without `proximal_log_probs`.
    """
    if not normaliser > 0:
        raise ConfigurationError(f"normaliser must be positive, not {normaliser}")
    if tis_cap is not None and proximal_log_probs is None:
        raise ConfigurationError("tis_cap weighs the trainer's against the engine's log-probs: it needs both")
    old = behaviour_log_probs if proximal_log_probs is None else proximal_log_probs
    zero = torch.zeros_like(log_probs)
    ratio = torch.where(loss_mask, _log_ratio(log_probs, old), zero).exp()
    advantages = torch.where(loss_mask, advantages, zero)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    weight = torch.ones_like(zero)
    if proximal_log_probs is not None and tis_cap is not None:
        log_weight = torch.where(loss_mask, _log_ratio(proximal_log_probs, behaviour_log_probs), zero)
        weight = log_weight.exp().clamp(max=tis_cap).detach()
    loss = -torch.where(loss_mask, weight * surrogate, zero).sum() / normaliser
    with torch.no_grad():
        drift = torch.where(loss_mask, _log_ratio(log_probs, behaviour_log_probs), zero)
        low = loss_mask & (advantages < 0) & (ratio < 1.0 - clip_low)
        high = loss_mask & (advantages > 0) & (ratio > 1.0 + clip_high)
        capped = loss_mask & (weight >= (math.inf if tis_cap is None else tis_cap))
        values = (
            loss_mask.sum(),
            loss,
            torch.where(loss_mask, ratio, zero).sum(),
            torch.where(loss_mask, ratio, zero + math.inf).min(),
            torch.where(loss_mask, ratio, zero - math.inf).max(),
            low.sum(),
            high.sum(),
            (drift.exp() - 1.0 - drift).sum(),
            torch.where(loss_mask, weight, zero).sum(),
            capped.sum(),
        )
        # one transfer from the device, not ten
        stats = LossStats(*torch.stack([value.to(log_probs.dtype) for value in values]).tolist())
    return PolicyLoss(loss, stats)


def _log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator - denominator).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
