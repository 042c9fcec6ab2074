"""Training rows to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gym_sdk.grpo.packing.rows import check_rows, pad_rows, to_row_values
from gym_sdk.tokens import TokenSequence

__all__ = ["TokenBatch", "to_tensors"]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows. Entry [r, t] of a matrix belongs to token t of row r.

    A *pair* is one prediction to score: a target token and the position before it.

    Attributes:
        input_ids: token ids; 0 where padded.
        attention_mask: 1 for a token, 0 for padding.
        position_ids: 0, 1, 2, ... in each row.
        loss_mask: whether the token was sampled by the policy and is trained.
        behaviour_log_probs: the sampler's log-prob where `loss_mask`, else 0.
        advantages: the row's advantage where `loss_mask`, else 0.
        targets: the token to score, of each pair.
        predecessors: the position before it, as an index into the flattened [rows * seq] positions.
        pair_index: the pair of each token where `loss_mask`, else 0.
    """

    input_ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    position_ids: Int[Tensor, "rows seq"]
    loss_mask: Bool[Tensor, "rows seq"]
    behaviour_log_probs: Float[Tensor, "rows seq"]
    advantages: Float[Tensor, "rows seq"]
    targets: Int[Tensor, " pairs"]
    predecessors: Int[Tensor, " pairs"]
    pair_index: Int[Tensor, "rows seq"]


def to_tensors(rows: Sequence[TokenSequence], device: torch.device | str = "cpu") -> TokenBatch:
    """Pad rows on the right and lay them out as tensors.

    Args:
        rows: at least one; each with its advantage set.
        device: where the tensors go.

    Returns:
        Tensors of shape [rows, longest row]; integers are int64, the rest is float32.

    Raises:
        ConfigurationError: there is no row, or a row has no advantage.
        TokenContractError: a row's first token carries loss (nothing precedes it, so it was not sampled), a
            row is empty, or its lists differ in length.
    """
    check_rows(rows)
    width = max(len(row) for row in rows)
    ids, masks, log_probs = to_row_values(rows)
    input_ids, loss_mask = pad_rows(ids, width), pad_rows(masks, width)
    positions = torch.arange(width).expand(len(rows), width)
    lengths = torch.tensor([len(row) for row in rows])
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32)
    trained = loss_mask.flatten().nonzero()[:, 0]
    pair_index = torch.zeros_like(input_ids)
    pair_index[loss_mask] = torch.arange(len(trained))
    return TokenBatch(
        input_ids=input_ids.to(device),
        attention_mask=(positions < lengths[:, None]).long().to(device),
        position_ids=positions.to(device),
        loss_mask=loss_mask.to(device),
        behaviour_log_probs=pad_rows(log_probs, width).to(device),
        advantages=(advantages[:, None] * loss_mask).to(device),
        targets=input_ids[loss_mask].to(device),
        predecessors=(trained - 1).to(device),
        pair_index=pair_index.to(device),
    )
