"""What a rule is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from gym_sdk.grpo.alarms.config import AlarmConfig

__all__ = ["MEDIANS", "Finding", "Rule", "StepView"]

MEDIANS: Final = ("generated_tokens_mean", "grad_norm_max")
"""The metrics whose running medians the rules need."""


class Finding(NamedTuple):
    """A number that is out of bounds, and what to say about it."""

    value: float
    message: str


@dataclass(frozen=True, slots=True)
class StepView:
    """What a rule may look at.

    Attributes:
        metrics: of the step.
        medians: running medians of `MEDIANS` over the steps before; absent after too few steps.
        config: the thresholds.
    """

    metrics: Mapping[str, float]
    medians: Mapping[str, float]
    config: AlarmConfig

    def above(self, name: str, limit: float | None) -> float | None:
        """Return the metric if it exceeds its limit."""
        value = self.metrics.get(name)
        return value if value is not None and limit is not None and value > limit else None

    def per_rollout(self, name: str) -> float:
        """Return a count divided by the number of rollouts; 0 without rollouts."""
        return self.metrics.get(name, 0.0) / max(1.0, self.metrics.get("rollouts", 0.0))


Rule: TypeAlias = Callable[[StepView], Finding | None]
