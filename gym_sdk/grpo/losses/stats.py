"""What a loss was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["LossStats"]

_EXTREMES: dict[str, Callable[[float, float], float]] = {"ratio_min": min, "ratio_max": max}


@dataclass(frozen=True, slots=True)
class LossStats:
    """Sums and extremes over the tokens with loss; those of micro-batches are added with `+`.

    Attributes:
        tokens: tokens with loss.
        rows: rows with such a token.
        loss: this part's share of the loss: the sum of the next three.
        policy_loss: the surrogate's share.
        kl_loss: the share of the divergence from the reference.
        entropy_loss: the entropy bonus's share; negative.
        ratio: sum of the probability ratios that are clipped.
        ratio_min: least ratio; infinity if there is no token.
        ratio_max: greatest ratio; minus infinity if there is no token.
        clipped_low: tokens whose ratio was below its range to effect: the gradient is gone ("clip"), or the
            weight was raised ("cispo").
        clipped_high: tokens whose ratio was above its range to effect: the gradient is gone ("clip"), or the
            weight was capped ("cispo").
        dual_clipped: tokens whose gradient the dual clip removed.
        behaviour_kl: sum of the k3 estimates of KL(behaviour || policy), without the clamp of `kl_estimate`.
        reference_kl: sum of the estimates of KL(policy || reference); 0 without reference.
        entropy: sum of the entropies, in nats; 0 if none were given.
        correction_weight: sum of the correction's weights; equal to `tokens` without correction.
        truncated_tokens: tokens whose weight the correction moved to a bound.
        masked_tokens: tokens that the correction left out.
        masked_rows: rows of which it left out every token.
    """

    tokens: float = 0.0
    rows: float = 0.0
    loss: float = 0.0
    policy_loss: float = 0.0
    kl_loss: float = 0.0
    entropy_loss: float = 0.0
    ratio: float = 0.0
    ratio_min: float = math.inf
    ratio_max: float = -math.inf
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    dual_clipped: float = 0.0
    behaviour_kl: float = 0.0
    reference_kl: float = 0.0
    entropy: float = 0.0
    correction_weight: float = 0.0
    truncated_tokens: float = 0.0
    masked_tokens: float = 0.0
    masked_rows: float = 0.0

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(
            **{
                name: _EXTREMES.get(name, float.__add__)(getattr(self, name), getattr(other, name))
                for name in (field.name for field in fields(self))
            }
        )

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor], dtype: torch.dtype) -> LossStats:
        """Fetch scalars by field name, in one transfer from the device."""
        numbers = torch.stack([value.to(dtype) for value in values.values()]).tolist()
        return cls(**dict(zip(values, numbers, strict=True)))
