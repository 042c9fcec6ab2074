"""Mean reward on tasks that are not trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gym_sdk.grpo.sources import RolloutSource, collect
from gym_sdk.schema import Group, Task

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        mean_reward: mean over tasks of the mean reward of the task's rollouts; None if no rollout has one.
        standard_error: of that mean, over tasks; None for fewer than two tasks with a reward.
        rollouts: how many there were.
        outcomes: how many ended in each way (`Outcome`).
        groups: the rollouts themselves, one group for each task.
    """

    mean_reward: float | None
    standard_error: float | None
    rollouts: int
    outcomes: dict[str, int]
    groups: list[Group]


async def evaluate(rollouts: RolloutSource, tasks: Sequence[Task]) -> EvalResult:
    """Roll out tasks and average their rewards.

    Rollouts without reward (failed, cancelled) are counted in `outcomes` and stay out of the mean.
    Tasks are the unit of the standard error, because rollouts of one task are not independent.

    Args:
        rollouts: as for `GRPOTrainer`.
        tasks: what to evaluate on.
    """
    groups = await collect(rollouts, tasks)
    means = [group.mean_reward for group in groups if group.mean_reward is not None]
    count = len(means)
    mean = sum(means) / count if count else None
    error = None
    if mean is not None and count > 1:
        error = math.sqrt(sum((value - mean) ** 2 for value in means) / (count - 1) / count)
    outcomes = Counter(rollout.outcome.value for group in groups for rollout in group.rollouts)
    return EvalResult(mean, error, sum(len(group.rollouts) for group in groups), dict(outcomes), groups)
