"""What every layout of training rows asks of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.tokens import TokenSequence

__all__ = ["check_rows", "pad_rows", "to_row_values"]


def check_rows(rows: Sequence[TokenSequence]) -> None:
    """Check that rows can be laid out for training.

    Raises:
        ConfigurationError: there is no row, or a row has no advantage.
        TokenContractError: a row's first token carries loss (nothing precedes it, so it was not sampled), a
            row is empty, or its lists differ in length.
    """
    if not rows:
        raise ConfigurationError("a batch needs at least one row")
    for row in rows:
        if row.advantage is None:
            raise ConfigurationError(f"a row of rollout {row.rollout_id!r} has no advantage; set it first")
        if not len(row.token_ids) == len(row.loss_mask) == len(row.log_probs) > 0:
            raise TokenContractError(
                f"a row of rollout {row.rollout_id!r} has {len(row.token_ids)} tokens, "
                f"{len(row.loss_mask)} mask entries and {len(row.log_probs)} log-probs; "
                "it needs the same number of each, at least 1"
            )
        if row.loss_mask[0]:
            raise TokenContractError(
                f"a row of rollout {row.rollout_id!r} starts with a sampled token; "
                "a prompt needs at least one token"
            )


def to_row_values(rows: Sequence[TokenSequence]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return each row's token ids (int64), loss mask (bool) and log-probs (float32), 0 where masked."""
    ids = [torch.tensor(row.token_ids, dtype=torch.long) for row in rows]
    masks = [torch.tensor(row.loss_mask) != 0 for row in rows]
    log_probs = [
        torch.tensor(row.log_probs, dtype=torch.float32).where(mask, 0.0)
        for row, mask in zip(rows, masks, strict=True)
    ]
    return ids, masks, log_probs


def pad_rows(rows: Sequence[Tensor], width: int) -> Tensor:
    """Stack 1-d tensors of different lengths into [rows, width], filled up with zeros on the right."""
    padded = rows[0].new_zeros((len(rows), width))
    for target, row in zip(padded, rows, strict=True):
        target[: row.shape[0]] = row
    return padded
