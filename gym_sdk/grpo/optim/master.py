"""Master weights: updates too small for a bfloat16 weight are not lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gym_sdk.errors import ConfigurationError

__all__ = ["MasterWeights", "masters_of"]

_KEY = "master_weights"


def masters_of(parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return a float32 copy of each parameter of lower precision."""
    return {
        parameter: parameter.detach().float()
        for parameter in parameters
        if parameter.dtype.itemsize < torch.float32.itemsize
    }


class MasterWeights(Optimizer):
    """Has an optimiser update float32 copies of low-precision weights, and rounds the result into the model.

    A bfloat16 weight has 8 bits: an update below 1/256 of it is rounded away, and at the learning rates of
    reinforcement learning nearly all are (mixed-precision training with master copies: arXiv 1710.03740,
    section 3.1). The copies add all of them up; a weight changes once they have carried its copy past the
    middle to the next bfloat16 number.

    Gradients are accumulated in float32 as well, by `Tensor.grad_dtype`; a torch that does not have it yet
    accumulates them in the weights' own precision. Memory, in bytes for each such parameter: 2 for the
    weight, 4 for the copy, 4 for the gradient, and what the optimiser keeps (AdamW: 8).

    The copies are the truth: weights that somebody else changes are overwritten at the next step. Load
    weights into a model before this is made, or this one's state after them.

    Args:
        optimizer: updates the copies, and may own other parameters too; made by `make_optimizer`.
        masters: the copy of each low-precision parameter.
    """

    def __init__(self, optimizer: Optimizer, masters: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__(optimizer.param_groups, {})
        self._optimizer = optimizer
        self._masters = dict(masters)
        self._share()
        if hasattr(Tensor, "grad_dtype"):
            for parameter, master in self._masters.items():
                parameter.grad_dtype = master.dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the copies by the parameters' gradients, and the parameters by the copies."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, master in self._masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self._optimizer.step()
        for parameter, master in self._masters.items():
            master.grad = None
            parameter.copy_(master)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters."""
        self._optimizer.zero_grad(set_to_none)
        for parameter in self._masters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, and the copies under `master_weights`; tensors are not cloned."""
        return {**self._optimizer.state_dict(), _KEY: list(self._masters.values())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a saved state back; the model's weights become the rounded copies.

        Raises:
            ConfigurationError: it has no copies, or those of other parameters; nothing has been changed.
            ValueError: the optimiser's part does not fit.
        """
        saved = state_dict.get(_KEY)
        shapes = [tuple(master.shape) for master in self._masters.values()]
        if saved is None:
            raise ConfigurationError(
                "the optimizer's state has no master weights: it was saved with a model in float32. Load the "
                "model in that precision to resume"
            )
        if [tuple(tensor.shape) for tensor in saved] != shapes:
            raise ConfigurationError("the optimizer's state has master weights of other parameters")
        self._optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != _KEY})
        self._share()
        for (parameter, master), tensor in zip(self._masters.items(), saved, strict=True):
            master.copy_(tensor)
            parameter.copy_(master)

    def _share(self) -> None:
        self.param_groups = self._optimizer.param_groups
        self.state = self._optimizer.state
