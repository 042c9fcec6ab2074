"""Policy-gradient losses as plain functions of padded `[rows, seq]` tensors.

`policy_loss` composes the pieces as a `LossConfig` says; each also stands alone, for a trainer of your own:

- `ratios`: how far the policy has moved, by token or by row
- `surrogates`: what of that movement is rewarded
- `corrections`: constant weights for the gap between the sampler and the trainer
- `divergences`: the distance from a reference policy
- `aggregation`: from tokens to one number, exact over micro-batches
- `stats`: what the loss was made of
"""

from gym_sdk.grpo.losses.aggregation import loss_normaliser, row_weights
from gym_sdk.grpo.losses.config import LossConfig
from gym_sdk.grpo.losses.corrections import Correction, correction_weights
from gym_sdk.grpo.losses.divergences import kl_estimate
from gym_sdk.grpo.losses.policy import PolicyLoss, policy_loss
from gym_sdk.grpo.losses.ratios import log_ratio, sequence_ratio, token_ratio
from gym_sdk.grpo.losses.stats import LossStats
from gym_sdk.grpo.losses.surrogates import cispo_surrogate, clipped_surrogate

__all__ = [
    "Correction",
    "LossConfig",
    "LossStats",
    "PolicyLoss",
    "cispo_surrogate",
    "clipped_surrogate",
    "correction_weights",
    "kl_estimate",
    "log_ratio",
    "loss_normaliser",
    "policy_loss",
    "row_weights",
    "sequence_ratio",
    "token_ratio",
]
