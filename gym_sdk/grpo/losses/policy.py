"""The loss: ratio, surrogate, correction, divergence, entropy and aggregation in one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.losses.aggregation import row_weights
from gym_sdk.grpo.losses.config import LossConfig
from gym_sdk.grpo.losses.corrections import Correction, correction_weights
from gym_sdk.grpo.losses.divergences import kl_estimate
from gym_sdk.grpo.losses.ratios import log_ratio, sequence_ratio, token_ratio
from gym_sdk.grpo.losses.stats import LossStats
from gym_sdk.grpo.losses.surrogates import cispo_surrogate, clipped_surrogate

__all__ = ["PolicyLoss", "policy_loss"]


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
    config: LossConfig = LossConfig(),  # noqa: B008 - frozen
    proximal_log_probs: Float[Tensor, "rows seq"] | None = None,
    reference_log_probs: Float[Tensor, "rows seq"] | None = None,
    entropy: Float[Tensor, "rows seq"] | None = None,
    on_policy: Bool[Tensor, "rows seq"] | None = None,
) -> PolicyLoss:
    """Compute the loss that `config` describes.

    `loss = sum_i v_i sum_t (-w_it J_it + kl_coefficient D_it - entropy_coefficient H_it) / normaliser`

    over the tokens with loss, with row weights v (`row_weights`), correction weights w
    (`correction_weights`), surrogate J (`clipped_surrogate` or `cispo_surrogate` of the `token_ratio` or
    `sequence_ratio`), divergence D (`kl_estimate`) and entropy H. See each for its formula and source.

    What lies outside the mask is ignored, whatever it holds. NaN *inside* it comes out as a NaN loss, never
    as an error: check `stats.loss` before the optimizer's step. Half precision is computed in float32.

    Args:
        log_probs: of the policy being trained, with gradient.
        behaviour_log_probs: of the sampler: the engine's `generation_log_probs`.
        advantages: of each token.
        loss_mask: which tokens count.
        normaliser: `loss_normaliser` of the *whole* minibatch, so that losses of its micro-batches add up to
            exactly the loss of the minibatch.
        config: which loss.
        proximal_log_probs: of the trainer's weights before the step's first update; read if
            `config.needs_proximal`.
        reference_log_probs: of the reference policy; read if `config.needs_reference`.
        entropy: of the distribution each token was drawn from, in nats; with gradient if
            `config.needs_entropy_gradient`. Without a coefficient it is only counted.
        on_policy: which tokens the weights at the start of the step sampled themselves: corrections that mask
            judge by those alone (`correction_weights`). None: all.

    Raises:
        ConfigurationError: the normaliser is not positive, a tensor that `config` needs is missing, one has
            another shape than the mask, or the mask is not boolean.
    """
    if not 0.0 < normaliser < math.inf:
        raise ConfigurationError(f"normaliser must be positive and finite, not {normaliser}")
    given = {
        "log_probs": log_probs,
        "behaviour_log_probs": behaviour_log_probs,
        "advantages": advantages,
        "proximal_log_probs": proximal_log_probs,
        "reference_log_probs": reference_log_probs,
        "entropy": entropy,
    }
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    log_probs, behaviour, advantages, proximal, reference, entropy = _inside(given, loss_mask, dtype, config)

    ratio = _ratio(log_probs, proximal if config.anchor == "proximal" else behaviour, loss_mask, config)
    surrogate = _surrogate(ratio, advantages, log_probs, config)
    low, high = config.correction_bounds
    correction = correction_weights(
        proximal,
        behaviour,
        loss_mask,
        correction=config.correction,
        low=low,
        high=high,
        on_policy=on_policy,
    )
    scale = row_weights(loss_mask, config.aggregation, dtype) * loss_mask / normaliser

    loss = policy_part = -(scale * correction.weights * surrogate).sum()
    divergence = kl_part = entropy_part = torch.zeros_like(loss)
    if config.needs_reference:
        divergence = kl_estimate(log_probs, reference, estimator=config.kl_estimator)
        kl_part = config.kl_coefficient * (scale * divergence).sum()
        loss = loss + kl_part
    if config.needs_entropy_gradient:
        entropy_part = -config.entropy_coefficient * (scale * entropy).sum()
        loss = loss + entropy_part

    with torch.no_grad():
        sums = {"loss": loss, "policy_loss": policy_part, "kl_loss": kl_part, "entropy_loss": entropy_part}
        sums |= {"reference_kl": divergence.sum(), "entropy": entropy.sum()}
        sums |= _ratio_stats(ratio, advantages, loss_mask, config)
        sums |= {"behaviour_kl": _drift(log_probs, behaviour)}
        sums |= _correction_stats(correction, loss_mask)
        stats = LossStats.from_tensors(sums, dtype)
    return PolicyLoss(loss, stats)


def _inside(
    given: Mapping[str, Tensor | None], loss_mask: Tensor, dtype: torch.dtype, config: LossConfig
) -> Iterator[Tensor]:
    """Check the inputs and zero what lies outside the mask, before it can meet a gradient."""
    if loss_mask.dtype != torch.bool:
        raise ConfigurationError(f"loss_mask is {loss_mask.dtype}; pass loss_mask.bool()")
    optional = {
        "proximal_log_probs": config.needs_proximal,
        "reference_log_probs": config.needs_reference,
        "entropy": config.needs_entropy_gradient,
    }
    for name, values in given.items():
        if values is None:
            if optional.get(name, True):
                raise ConfigurationError(f"this LossConfig needs {name}: pass it, or change the config")
            yield torch.zeros_like(loss_mask, dtype=dtype)
        elif values.shape != loss_mask.shape:
            shapes = f"{tuple(values.shape)} and loss_mask {tuple(loss_mask.shape)}"
            raise ConfigurationError(f"{name} has shape {shapes}; expand it to the mask's")
        else:
            yield values.to(dtype).where(loss_mask, 0.0)


def _ratio(log_probs: Tensor, anchor: Tensor, loss_mask: Tensor, config: LossConfig) -> Tensor:
    if config.ratio == "sequence":
        return sequence_ratio(log_probs, anchor, loss_mask)
    return token_ratio(log_probs, anchor)


def _surrogate(ratio: Tensor, advantages: Tensor, log_probs: Tensor, config: LossConfig) -> Tensor:
    low, high = config.clip_low, config.clip_high
    if config.surrogate == "cispo":
        return cispo_surrogate(ratio, advantages, log_probs, clip_low=low, clip_high=high)
    return clipped_surrogate(ratio, advantages, clip_low=low, clip_high=high, dual_clip=config.dual_clip)


def _drift(log_probs: Tensor, behaviour: Tensor) -> Tensor:
    difference = log_ratio(log_probs, behaviour)
    return (difference.exp() - 1.0 - difference).sum()


def _ratio_stats(
    ratio: Tensor, advantages: Tensor, loss_mask: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    low = loss_mask & (ratio < 1.0 - config.clip_low)
    high = loss_mask & (ratio > 1.0 + config.clip_high)
    if config.surrogate == "clip":
        low, high = low & (advantages < 0), high & (advantages > 0)
    limit = math.inf if config.dual_clip is None else config.dual_clip
    return {
        "ratio": ratio.where(loss_mask, 0.0).sum(),
        "ratio_min": ratio.where(loss_mask, math.inf).min(),
        "ratio_max": ratio.where(loss_mask, -math.inf).max(),
        "clipped_low": low.sum(),
        "clipped_high": high.sum(),
        "dual_clipped": (loss_mask & (advantages < 0) & (ratio > limit)).sum(),
    }


def _correction_stats(correction: Correction, loss_mask: Tensor) -> dict[str, Tensor]:
    rows = loss_mask.any(-1)
    kept = (loss_mask & ~correction.masked).any(-1)
    return {
        "tokens": loss_mask.sum(),
        "rows": rows.sum(),
        "correction_weight": correction.weights.where(loss_mask, 0.0).sum(),
        "truncated_tokens": correction.truncated.sum(),
        "masked_tokens": correction.masked.sum(),
        "masked_rows": (rows & ~kept).sum(),
    }
