"""Muon: momentum whose update is made orthogonal. On this model it needs about half of Adam's time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["Muon"]

# Coefficients of the quintic Newton-Schulz iteration, from Keller Jordan, "Muon" (2024),
# https://kellerjordan.github.io/posts/muon/
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


class Muon:
    """Optimizes matrices. Those of the same shape are worked on together, which a CPU likes.

    torch has a Muon since 2.9; this one also serves older versions, and stays in float32.

    Args:
        parameters: matrices, each of shape [out, in].
        momentum: of the Nesterov average.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self._groups = [(same, torch.zeros(len(same), *shape)) for shape, same in by_shape.items()]
        self._momentum = momentum

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the matrices from their gradients, and clear these."""
        for parameters, average in self._groups:
            gradient = torch.stack([_gradient(parameter) for parameter in parameters])
            average.lerp_(gradient, 1.0 - self._momentum)
            update = _orthogonalize(gradient.lerp(average, self._momentum))
            rows, columns = update.shape[1:]
            scale = learning_rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(parameters, update, strict=True):
                parameter.add_(change, alpha=-scale)
                parameter.grad = None


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        raise RuntimeError("a matrix has no gradient: call backward first")
    return parameter.grad


def _orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix [batch, rows, columns] near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.transpose(1, 2) if tall else x
