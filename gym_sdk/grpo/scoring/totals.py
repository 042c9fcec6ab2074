"""The sums over the vocabulary that the forward pass accumulates, block by block."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gym_sdk.grpo.scoring.blocks import LogitBlocks, accumulate

__all__ = ["Totals"]


class Totals:
    """Running sums of `exp(y - maximum)` over the vocabulary, for each token (arXiv 1805.02867, algorithm 3).

    Args:
        blocks: the logits `y`.
        with_entropy: also accumulate `sum exp(y - maximum) y`.
        with_expected: also accumulate `sum exp(y - maximum) W`.
    """

    def __init__(self, blocks: LogitBlocks, *, with_entropy: bool, with_expected: bool) -> None:
        tokens, size = blocks.hidden.shape
        self._blocks = blocks
        zeros = blocks.hidden.new_zeros(tokens, dtype=blocks.dtype)
        self.target_logits: Float[Tensor, " tokens"] = zeros.clone()
        self.maximum: Float[Tensor, " tokens"] = torch.full_like(zeros, -torch.inf)
        self.mass: Float[Tensor, " tokens"] = zeros.clone()
        self.weighted: Float[Tensor, " tokens"] | None = zeros.clone() if with_entropy else None
        self.expected: Float[Tensor, "tokens size"] | None = None
        if with_expected:
            self.expected = zeros.new_zeros((tokens, size))
        self._logits = blocks.buffer()
        # The exponentials overwrite the logits unless those are needed once more.
        self._exponentials = blocks.buffer() if with_entropy else None

    def compute(self, targets: Int[Tensor, " tokens"]) -> None:
        """Go over all blocks."""
        for columns, weight in self._blocks.columns:
            for rows in self._blocks.rows:
                self._add(rows, columns, weight, targets)

    def _add(self, rows: slice, columns: slice, weight: Tensor, targets: Tensor) -> None:
        blocks = self._blocks
        logits = blocks.view(self._logits, rows, columns)
        blocks.compute(rows, columns, weight, logits)
        index, hit = blocks.find(targets, rows, columns)
        found = logits.gather(1, index)[:, 0]
        self.target_logits[rows] = torch.where(hit, found, self.target_logits[rows])

        maximum = torch.maximum(self.maximum[rows], logits.amax(1))
        decay = (self.maximum[rows] - maximum).exp_()
        self.maximum[rows] = maximum
        out = logits if self._exponentials is None else blocks.view(self._exponentials, rows, columns)
        exponentials = torch.sub(logits, maximum[:, None], out=out).exp_()
        self.mass[rows] = self.mass[rows] * decay + exponentials.sum(1)
        if self.expected is not None:
            expected = self.expected[rows].mul_(decay[:, None])
            accumulate(expected, exponentials.to(weight.dtype), weight)
        if self.weighted is not None:
            self.weighted[rows] = self.weighted[rows] * decay + exponentials.mul_(logits).sum(1)
