"""The key-value cache: one row of positions for each slot, in one tensor per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SlotCache"]


class SlotCache:
    """Keys and values of all slots, `[rows, kv_heads, length, head_dim]` for each layer.

    Both rows and length grow by doubling, so memory follows use. Layers are allocated when they are first
    written, because only the model knows its shapes. What lies beyond a row's valid length is arbitrary but
    finite, so masked positions never turn a sum into NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows = 0
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Grow to at least these sizes, keeping the contents."""
        rows, length = max(rows, self.rows), max(length, self.length)
        if (rows, length) == (self.rows, self.length):
            return
        for store in (self.keys, self.values):
            for layer, old in store.items():
                new = old.new_zeros(rows, old.shape[1], length, old.shape[3])
                new[: self.rows, :, : self.length] = old
                store[layer] = new
        self.rows, self.length = rows, length

    def write(self, layer: int, index: Tensor, key: Tensor, value: Tensor) -> None:
        """Store new positions.

        Args:
            layer: the layer's number.
            index: from `flat_index`, length tokens x kv_heads.
            key: `[tokens, kv_heads, head_dim]`.
            value: `[tokens, kv_heads, value_head_dim]`.
        """
        for store, new in ((self.keys, key), (self.values, value)):
            if layer not in store:
                store[layer] = new.new_zeros(self.rows, new.shape[1], self.length, new.shape[2])
            store[layer].view(-1, new.shape[2]).index_copy_(0, index, new.reshape(-1, new.shape[2]))

    def flat_index(self, rows: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
        """Where `[row, head, position]` lies in a layer seen as `[rows * heads * length, head_dim]`."""
        heads = torch.arange(kv_heads, device=self.device)
        return ((rows[:, None] * kv_heads + heads) * self.length + positions[:, None]).flatten()

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of rows; all are read before any is written."""
        if not sources or not length:
            return
        source = torch.tensor(sources, device=self.device)
        target = torch.tensor(targets, device=self.device)
        for store in (self.keys, self.values):
            for tensor in store.values():
                part = tensor[:, :, :length]
                part.index_copy_(0, target, part.index_select(0, source))

    def clear(self) -> None:
        """Free all memory."""
        self.keys.clear()
        self.values.clear()
        self.rows = self.length = 0
