"""Training rows end to end in one stream, for trainers with packing of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gym_sdk.grpo.packing.rows import check_rows, to_row_values
from gym_sdk.tokens import TokenSequence

__all__ = ["FlatBatch", "to_flat_tensors"]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Rows one after another, without padding: what variable-length attention kernels take.

    Attributes:
        input_ids: token ids.
        position_ids: 0, 1, 2, ... in each row.
        row_index: the row of each token.
        cu_seq_lens: where each row starts, and the end of the last: int32, as flash attention wants it.
        max_length: tokens of the longest row.
        loss_mask: whether the token was sampled by the policy and is trained; never set on a row's first
            token, so labels that are shifted by one never cross rows.
        behaviour_log_probs: the sampler's log-prob where `loss_mask`, else 0.
        advantages: the row's advantage where `loss_mask`, else 0.
    """

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    row_index: Int[Tensor, " tokens"]
    cu_seq_lens: Int[Tensor, " rows_and_one"]
    max_length: int
    loss_mask: Bool[Tensor, " tokens"]
    behaviour_log_probs: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " tokens"]


def to_flat_tensors(rows: Sequence[TokenSequence], device: torch.device | str = "cpu") -> FlatBatch:
    """Lay rows one after another, in the order given; nothing is shared or left out.

    Args:
        rows: at least one; each with its advantage set.
        device: where the tensors go.

    Raises:
        ConfigurationError: there is no row, or a row has no advantage.
        TokenContractError: a row's first token carries loss, a row is empty, or its lists differ in length.
    """
    check_rows(rows)
    ids, masks, log_probs = to_row_values(rows)
    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    loss_mask = torch.cat(masks)
    advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32)
    return FlatBatch(
        input_ids=torch.cat(ids).to(device),
        position_ids=(torch.arange(len(loss_mask)) - (ends - lengths).repeat_interleave(lengths)).to(device),
        row_index=torch.arange(len(rows)).repeat_interleave(lengths).to(device),
        cu_seq_lens=torch.cat([ends.new_zeros(1), ends]).int().to(device),
        max_length=int(lengths.max()),
        loss_mask=loss_mask.to(device),
        behaviour_log_probs=torch.cat(log_probs).to(device),
        advantages=(advantages.repeat_interleave(lengths) * loss_mask).to(device),
    )
