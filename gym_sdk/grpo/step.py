"""What a step of training was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gym_sdk.errors import GymError
from gym_sdk.grpo.alarms import Alarm
from gym_sdk.grpo.evaluation import EvalResult, most_common_failure
from gym_sdk.schema import Group

__all__ = ["TrainStep", "require_rewards"]


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One step of training.

    Attributes:
        index: which step it was, from 1.
        metrics: its numbers (docs/training_metrics.md). A step in which nothing was trainable has `updates` 0
            and no numbers of updates.
        groups: the rollouts it learned from, in the order of its tasks.
        weight_version: the version of the weights after it.
        seconds: how long it took, in seconds.
        evaluations: what was evaluated after it, by name.
        alarms: what in its numbers is worth a look; each was logged as a warning.
    """

    index: int
    metrics: dict[str, float]
    groups: list[Group]
    weight_version: str
    seconds: float
    evaluations: dict[str, EvalResult]
    alarms: list[Alarm]


def require_rewards(groups: Sequence[Group], *, step: int) -> None:
    """Stop a run that has nothing to learn from because its infrastructure is broken.

    Raises:
        GymError: none of the rollouts has a reward; the message has the most common failure.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not any(rollout.ok for rollout in rollouts):
        count = f"none of the {len(rollouts)} rollouts has a reward; " if rollouts else ""
        raise GymError(f"step {step}: {count}{most_common_failure(groups)}")
