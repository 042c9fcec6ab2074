"""Logits a block at a time, and the matrix products around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gym_sdk.grpo.scoring.chunks import ChunkSizes

__all__ = ["LogitBlocks", "accumulate", "operand_dtype"]


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Choose the precision in which hidden states and weights are multiplied.

    On CUDA half-precision operands stay as they are, and under autocast operands take its type: the product
    is accumulated and read in float32. Other devices would round that product to half precision, so operands
    are widened to float32 there, a block of the weight at a time.
    """
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.device.type == "cuda":
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else wide
    return torch.promote_types(wide, torch.float32)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total` in place, in the precision of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


@dataclass(frozen=True, slots=True)
class LogitBlocks:
    """The logits `x = inner * (h W^T + b)`, or `outer * tanh(x)` with a soft cap, a block at a time."""

    hidden: Float[Tensor, "tokens size"]
    """In the operands' precision."""
    weight: Float[Tensor, "vocab size"]
    bias: Float[Tensor, " vocab"] | None
    inner: float
    outer: float | None
    chunks: ChunkSizes
    dtype: torch.dtype
    """Of the logits: float32, or float64 for operands in float64."""

    @property
    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the vocabulary with their rows of the weight, in the operands' precision."""
        for start in range(0, self.weight.shape[0], self.chunks.vocab):
            columns = slice(start, min(start + self.chunks.vocab, self.weight.shape[0]))
            yield columns, self.weight[columns].to(self.hidden.dtype)

    @property
    def rows(self) -> list[slice]:
        """Blocks of the tokens."""
        tokens, step = self.hidden.shape[0], self.chunks.tokens
        return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]

    def buffer(self) -> Tensor:
        """Allocate room for one block."""
        tokens, vocab = self.hidden.shape[0], self.weight.shape[0]
        size = min(self.chunks.tokens, tokens) * min(self.chunks.vocab, vocab)
        return self.hidden.new_empty(size, dtype=self.dtype)

    def view(self, buffer: Tensor, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Shape the buffer as a block."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return buffer[: height * width].view(height, width)

    def compute(self, rows: slice, columns: slice, weight: Tensor, out: Tensor) -> None:
        """Write the block's logits into `out`; `weight` is the block's part as `columns` gave it."""
        hidden, bias = self.hidden[rows], None if self.bias is None else self.bias[columns].to(self.dtype)
        if hidden.dtype == self.dtype:
            start, beta = (out, 0.0) if bias is None else (bias, self.inner)
            torch.addmm(start, hidden, weight.T, beta=beta, alpha=self.inner, out=out)
        else:
            torch.mm(hidden, weight.T, out_dtype=self.dtype, out=out)
            if bias is not None:
                out.add_(bias)
            if self.inner != 1.0:
                out.mul_(self.inner)
        if self.outer is not None:
            out.tanh_().mul_(self.outer)

    def find(
        self, targets: Int[Tensor, " tokens"], rows: slice, columns: slice
    ) -> tuple[Int[Tensor, "rows 1"], Tensor]:
        """Locate targets in a block: their column, and whether they are in it (else the column is any)."""
        index = targets[rows] - columns.start
        width = columns.stop - columns.start
        return index.clamp(0, width - 1)[:, None], (index >= 0) & (index < width)
