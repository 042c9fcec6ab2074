"""Training rows to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.tokens import TokenSequence

__all__ = ["TokenBatch", "pad_rows", "to_tensors"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows. Entry [r, t] of each tensor belongs to token t of row r.

    Attributes:
        input_ids: token ids; 0 where padded.
        attention_mask: 1 for a token, 0 for padding.
        position_ids: 0, 1, 2, ... in each row.
        loss_mask: whether the token was sampled by the policy and is trained.
        behaviour_log_probs: the sampler's log-prob where `loss_mask`, else 0.
        advantages: the row's advantage where `loss_mask`, else 0.
    """

    input_ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    position_ids: Int[Tensor, "rows seq"]
    loss_mask: Bool[Tensor, "rows seq"]
    behaviour_log_probs: Float[Tensor, "rows seq"]
    advantages: Float[Tensor, "rows seq"]


def to_tensors(rows: Sequence[TokenSequence], device: torch.device | str = "cpu") -> TokenBatch:
    """Pad rows on the right and lay them out as tensors.

    Args:
        rows: at least one; each with its advantage set.
        device: where the tensors go.

    Returns:
        Tensors of shape [rows, longest row]; integers are int64, the rest is float32.

    Raises:
        ConfigurationError: there is no row, or a row has no advantage.
        TokenContractError: a row's first token carries loss (nothing precedes it, so it was not sampled), or
            its lists differ in length.
    """
    if not rows:
        raise ConfigurationError("a batch needs at least one row")
    for row in rows:
        _check_row(row)
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.arange(width).expand(len(rows), width)
    loss_mask = pad_rows([torch.tensor(row.loss_mask) for row in rows], width) != 0
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32)
    return TokenBatch(
        input_ids=pad_rows([torch.tensor(row.token_ids) for row in rows], width).to(device),
        attention_mask=(positions < lengths[:, None]).long().to(device),
        position_ids=positions.to(device),
        loss_mask=loss_mask.to(device),
        behaviour_log_probs=pad_rows([torch.tensor(row.log_probs) for row in rows], width).to(device),
        advantages=(advantages[:, None] * loss_mask).to(device),
    )


def pad_rows(rows: Sequence[Tensor], width: int) -> Tensor:
    """Stack 1-d tensors of different lengths into [rows, width], filled up with zeros on the right."""
    padded = rows[0].new_zeros((len(rows), width))
    for target, row in zip(padded, rows, strict=True):
        target[: row.shape[0]] = row
    return padded


def _check_row(row: TokenSequence) -> None:
    if row.advantage is None:
        raise ConfigurationError(f"a row of rollout {row.rollout_id!r} has no advantage; set it first")
    if not len(row.token_ids) == len(row.loss_mask) == len(row.log_probs) > 0:
        raise TokenContractError(
            f"a row of rollout {row.rollout_id!r} has {len(row.token_ids)} tokens, {len(row.loss_mask)} mask "
            f"entries and {len(row.log_probs)} log-probs; it needs the same number of each, at least 1"
        )
    if row.loss_mask[0]:
        raise TokenContractError(
            f"a row of rollout {row.rollout_id!r} starts with a sampled token; "
            "a prompt needs at least one token"
        )
