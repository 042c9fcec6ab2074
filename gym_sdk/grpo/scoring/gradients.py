"""The backward pass: what each block of logits adds to the gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gym_sdk.grpo.scoring.blocks import LogitBlocks, accumulate

__all__ = ["Gradients", "Upstream"]


@dataclass(frozen=True, slots=True)
class Upstream:
    """What the backward pass knows of each token."""

    targets: Int[Tensor, " tokens"]
    log_normaliser: Float[Tensor, " tokens"]
    log_probs: Float[Tensor, " tokens"]
    """Gradient of the loss with respect to the log-prob."""
    entropy: Float[Tensor, " tokens"] | None
    entropies: Float[Tensor, " tokens"] | None
    """Gradient of the loss with respect to the entropy; None if there is none."""

    @property
    def factor(self) -> Float[Tensor, " tokens"]:
        """What `slope` leaves out of the gradient: it multiplies [tokens, size] once, and not every block."""
        return -self.log_probs if self.entropies is None else torch.full_like(self.log_probs, -1.0)

    def slope(
        self, logits: Tensor, rows: slice, index: Int[Tensor, "rows 1"], hit: Tensor
    ) -> Float[Tensor, "rows columns"]:
        """Compute the gradient of the loss with respect to a block's logits, divided by `factor`, in place.

        With `p = softmax(y)` and its entropy `H`, `dL/dy = dL/dlog_prob (onehot - p) - dL/dH p (log p + H)`.
        """
        log_p = logits.sub_(self.log_normaliser[rows, None])
        if self.entropies is None or self.entropy is None:
            return log_p.exp_().scatter_add_(1, index, -hit.to(log_p.dtype)[:, None])
        grad = self.log_probs[rows, None]
        p = log_p.exp()
        log_p.add_(self.entropy[rows, None]).mul_(self.entropies[rows, None]).add_(grad)
        return log_p.mul_(p).scatter_add_(1, index, -grad * hit[:, None])


class Gradients:
    """Gradients of hidden states, weight and bias, accumulated over blocks.

    Args:
        blocks: the logits.
        upstream: the gradients that arrive.
        needed: whether hidden states, weight and bias need a gradient.
    """

    def __init__(self, blocks: LogitBlocks, upstream: Upstream, needed: tuple[bool, bool, bool]) -> None:
        hidden, weight, dtype = blocks.hidden, blocks.weight, blocks.dtype
        self._blocks, self._upstream = blocks, upstream
        self._buffer = blocks.buffer()
        self._factor = blocks.inner * upstream.factor
        self._hidden: Tensor | None = None
        self._scaled_hidden: Tensor | None = None
        self._bias: Tensor | None = None
        if needed[0]:
            self._hidden = torch.zeros_like(hidden, dtype=dtype)
        if needed[1]:
            self._scaled_hidden = (hidden.to(dtype) * self._factor[:, None]).to(hidden.dtype)
        if needed[2]:
            self._bias = hidden.new_zeros(weight.shape[0], dtype=dtype)

    def compute(self, total: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Go over all blocks and return the three gradients; that of the weight in the weight's precision.

        Args:
            total: what the weight's gradient is added to, instead of being returned.
        """
        weight_grad = total
        if weight_grad is None and self._scaled_hidden is not None:
            weight_grad = torch.zeros_like(self._blocks.weight)
        for columns, weight in self._blocks.columns:
            weight_block = None
            if weight_grad is not None:
                # Summed over the tokens here, and rounded once if the weight is in half precision.
                same = weight_grad.dtype == self._blocks.dtype
                weight_block = (
                    weight_grad[columns] if same else weight.new_zeros(weight.shape, dtype=self._blocks.dtype)
                )
            for rows in self._blocks.rows:
                self._add(rows, columns, weight, weight_block)
            if weight_grad is not None and weight_block is not None and not same:
                weight_grad[columns] += weight_block
        if self._hidden is not None:
            self._hidden.mul_(self._factor[:, None])
        return self._hidden, None if total is not None else weight_grad, self._bias

    def _add(self, rows: slice, columns: slice, weight: Tensor, weight_grad: Tensor | None) -> None:
        blocks = self._blocks
        logits = blocks.view(self._buffer, rows, columns)
        blocks.compute(rows, columns, weight, logits)
        cap_slope = None if blocks.outer is None else blocks.outer - logits.square().div_(blocks.outer)
        slope = self._upstream.slope(logits, rows, *blocks.find(self._upstream.targets, rows, columns))
        if cap_slope is not None:
            slope.mul_(cap_slope)
        if self._bias is not None:
            self._bias[columns].addmv_(slope.T, self._factor[rows])
        slope = slope.to(weight.dtype)
        if self._hidden is not None:
            accumulate(self._hidden[rows], slope, weight)
        if weight_grad is not None and self._scaled_hidden is not None:
            accumulate(weight_grad, slope.T, self._scaled_hidden[rows])
