"""Several optimisers as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["CompositeOptimizer"]


class CompositeOptimizer(Optimizer):
    """Several optimisers, each over parameters of its own, with the interface and the state of one.

    Parameter groups and state are the parts' own objects, so that whoever sets a group's learning rate, or
    saves and loads the state, does it as with any other optimiser.

    Args:
        parts: the optimisers; no parameter belongs to two of them.

    Raises:
        ValueError: a parameter belongs to two of them.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each part, in order."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a saved state back, in the parts too."""
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
