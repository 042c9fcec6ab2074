"""Probability ratios between two policies, by token or by row."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["log_ratio", "masked_mean", "sequence_ratio", "token_ratio"]

_MAX_LOG_RATIO = 20.0


def log_ratio(
    log_probs: Float[Tensor, "rows seq"], anchor_log_probs: Float[Tensor, "rows seq"]
) -> Float[Tensor, "rows seq"]:
    """Subtract log-probs and clamp the difference to ±20.

    With the clamp one absurd token gives a large ratio (e^20 is 5e8), not an infinite one; a token beyond it
    has no gradient. NaN stays NaN.
    """
    return (log_probs - anchor_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def token_ratio(
    log_probs: Float[Tensor, "rows seq"], anchor_log_probs: Float[Tensor, "rows seq"]
) -> Float[Tensor, "rows seq"]:
    """Compute `r_t = exp(log_probs_t - anchor_t)` (PPO, arXiv 1707.06347, section 3), with `log_ratio`."""
    return log_ratio(log_probs, anchor_log_probs).exp()


def sequence_ratio(
    log_probs: Float[Tensor, "rows seq"],
    anchor_log_probs: Float[Tensor, "rows seq"],
    loss_mask: Bool[Tensor, "rows seq"],
) -> Float[Tensor, "rows seq"]:
    r"""Compute each row's length-normalised ratio, with a gradient of its own for each token.

    The value at every token of row i is `s_i = exp(mean_t(log_probs_t - anchor_t))` over the row's tokens
    with loss (GSPO, arXiv 2507.18071, eq. 7); its gradient is `s_i * d log_probs_t`, that of GSPO-token
    (eq. 14): `s_it = sg[s_i] * p_t / sg[p_t]`, where sg stops the gradient. With one advantage for all tokens
    of a row, GSPO and GSPO-token have equal gradients.

    Args:
        log_probs: of the policy being trained, with gradient; finite outside the mask too.
        anchor_log_probs: what the ratio is taken against; finite outside the mask too.
        loss_mask: the tokens of each row that count.

    Returns:
        The ratio at each token; at tokens without loss, too.
    """
    difference = log_ratio(log_probs, anchor_log_probs)
    row = masked_mean(difference, loss_mask).detach()
    return (row + (difference - difference.detach())).exp()


def masked_mean(
    values: Float[Tensor, "rows seq"], loss_mask: Bool[Tensor, "rows seq"]
) -> Float[Tensor, "rows 1"]:
    """Average each row over its tokens with loss; 0 for a row without any."""
    total = values.where(loss_mask, 0.0).sum(-1, keepdim=True)
    return total / loss_mask.sum(-1, keepdim=True).clamp(min=1)
