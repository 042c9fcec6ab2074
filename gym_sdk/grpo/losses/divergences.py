"""Estimates of the divergence from a reference policy."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from gym_sdk.grpo.losses.ratios import log_ratio

__all__ = ["KLEstimator", "kl_estimate"]

KLEstimator = Literal["k1", "k2", "k3"]

_MAX_K3 = 10.0


def kl_estimate(
    log_probs: Float[Tensor, "rows seq"],
    reference_log_probs: Float[Tensor, "rows seq"],
    *,
    estimator: KLEstimator,
) -> Float[Tensor, "rows seq"]:
    """Estimate KL(policy || reference) at each token, from the token that was drawn.

    With `d = log_probs - reference` (Schulman, "Approximating KL divergence", 2020):

    - `k1 = d`: unbiased as a value, can be negative. Its gradient is that of log_probs, which does not know
      the reference and is 0 in expectation: as a loss it only adds noise. It is a penalty for the reward.
    - `k2 = d^2 / 2`: biased as a value. Its gradient is `d` times that of log_probs: in expectation over
      tokens drawn from the policy, the gradient of KL(policy || reference).
    - `k3 = exp(-d) - 1 + d`: unbiased and never negative. Its gradient is `1 - exp(-d)` times that of
      log_probs: in the same expectation, the gradient of KL(reference || policy).

    (Gradients: Tang and Munos, arXiv 2506.09477.) `d` is clamped to ±20, and k3 to at most 10, which it
    reaches at d of about -2.6 and 11: else one token that the policy has all but given up would outweigh
    the batch. A clamped token has no gradient.

    Args:
        log_probs: of the policy being trained, with gradient.
        reference_log_probs: of the reference policy.
        estimator: which of the above.
    """
    difference = log_ratio(log_probs, reference_log_probs)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2.0
    return ((-difference).exp() - 1.0 + difference).clamp(max=_MAX_K3)
