"""From losses of tokens to one loss, so that those of micro-batches add up to the minibatch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from gym_sdk.grpo.losses.config import LossConfig

__all__ = ["Aggregation", "loss_normaliser", "row_weights"]

Aggregation = Literal["token", "sequence", "constant"]


def loss_normaliser(trained_tokens: Sequence[int], config: LossConfig) -> float:
    """Compute what the weighted sum over a minibatch's tokens is divided by.

    `loss = sum_i row_weight_i * sum_t loss_it / normaliser`, with `row_weights` and

    - `aggregation="token"`: all tokens with loss (DAPO, arXiv 2503.14476, eq. 8);
    - `"sequence"`: the rows with such a token (GRPO, arXiv 2402.03300, eq. 3);
    - `"constant"`: those rows times `config.constant_tokens` (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Args:
        trained_tokens: how many tokens carry loss, for each row of the *whole* minibatch: over all
            micro-batches and, if there are several, all processes.
        config: the loss's settings.

    Raises:
        ConfigurationError: no row has a token with loss: there is nothing to divide.
    """
    rows = sum(count > 0 for count in trained_tokens)
    if not rows:
        raise ConfigurationError(
            f"none of the {len(trained_tokens)} rows has a token with loss; skip this minibatch"
        )
    if config.aggregation == "token":
        return float(sum(trained_tokens))
    if config.constant_tokens is None:
        return float(rows)
    return float(rows * config.constant_tokens)


def row_weights(
    loss_mask: Bool[Tensor, "rows seq"], aggregation: Aggregation, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows 1"]:
    """Compute what each row's sum over tokens is multiplied by, before the normaliser.

    It is 1 over the row's tokens with loss for "sequence", else 1; so a row must lie in one micro-batch.
    """
    tokens = loss_mask.sum(-1, keepdim=True).clamp(min=1).to(dtype)
    return tokens.reciprocal() if aggregation == "sequence" else torch.ones_like(tokens)
