"""What an evaluation found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from gym_sdk.errors import ConfigurationError
from gym_sdk.metrics import Estimate, pass_at
from gym_sdk.metrics.groups import RewardMoments
from gym_sdk.schema import Group, Outcome, Rollout

__all__ = ["EvalResult", "most_common_failure"]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        mean_reward: mean over tasks of the mean reward of the task's rollouts; None if no rollout has one.
        standard_error: of that mean, over tasks; None for fewer than two tasks with a reward.
        rollouts: how many there were.
        outcomes: how many ended in each way (`Outcome`).
        groups: the rollouts themselves, one group for each task.
        pass_at: pass@k for k = 1, 2, 4, ..., as far as the largest group reaches
            (`gym_sdk.metrics.pass_at`); with one rollout for each task there is none beyond k = 1.
        seconds: how long it took, in seconds.
        failure: why it counts for nothing: its rollouts failed for reasons that are not the policy's. None:
            it counts.
    """

    mean_reward: float | None
    standard_error: float | None
    rollouts: int
    outcomes: dict[str, int]
    groups: list[Group]
    pass_at: dict[int, Estimate]
    seconds: float
    failure: str | None = None

    @classmethod
    def of(cls, groups: list[Group], *, threshold: float = 1.0, seconds: float = 0.0) -> Self:
        """Count what was rolled out.

        Raises:
            ConfigurationError: a reward is not finite.
        """
        moments = RewardMoments()
        for group in groups:
            for rollout in group.rollouts:
                if rollout.reward is not None and not math.isfinite(rollout.reward):
                    raise ConfigurationError(
                        f"rollout {rollout.id}: a reward must be finite: {rollout.reward}"
                    )
            moments.add([] if group.mean_reward is None else [group.mean_reward])
        mean = moments.estimate()
        most = max((len(group.rewards) for group in groups), default=0)
        ks = [2**power for power in range(most.bit_length())]
        outcomes = Counter(rollout.outcome.value for group in groups for rollout in group.rollouts)
        return cls(
            mean_reward=mean.value,
            standard_error=mean.error,
            rollouts=sum(len(group.rollouts) for group in groups),
            outcomes=dict(outcomes),
            groups=groups,
            pass_at={k: pass_at(groups, k, threshold=threshold) for k in ks},
            seconds=seconds,
        )

    @property
    def score(self) -> float | None:
        """The mean reward, if the evaluation counts: what decides on the best step and on stopping."""
        return self.mean_reward if self.failure is None else None

    @property
    def valid(self) -> int:
        """How many rollouts have a reward."""
        return sum(len(group.rewards) for group in self.groups)

    def metrics(self, name: str = "eval") -> dict[str, float]:
        """Return the numbers, as `NAME/...`.

        A mean of nothing is absent. Lengths are over the rollouts with a reward; `generated_tokens_mean` is
        there if the policy's server says which tokens it sampled.
        """
        counts = {outcome.value: self.outcomes.get(outcome.value, 0) for outcome in Outcome}
        metrics: dict[str, float] = {"rollouts": self.rollouts, "valid": self.valid, **counts}
        metrics["seconds"] = self.seconds
        if self.mean_reward is not None:
            metrics["reward_mean"] = self.mean_reward
        if self.standard_error is not None:
            metrics["reward_error"] = self.standard_error
        for k, estimate in self.pass_at.items():
            if estimate.value is not None:
                metrics[f"pass_at_{k}"] = estimate.value
        metrics |= _length_metrics([rollout for group in self.groups for rollout in group.valid])
        return {f"{name}/{key}": value for key, value in metrics.items()}


def _length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    if not rollouts:
        return {}
    count = len(rollouts)
    calls = [call for rollout in rollouts for call in rollout.model_calls]
    tokens = [len(call.tokens.generation_token_ids) for call in calls if call.tokens is not None]
    metrics = {
        "turns_mean": len(calls) / count,
        "tool_calls_mean": sum(len(rollout.function_calls) for rollout in rollouts) / count,
    }
    if len(tokens) == len(calls):
        metrics["generated_tokens_mean"] = sum(tokens) / count
    return metrics


def most_common_failure(groups: Sequence[Group]) -> str:
    """Describe why rollouts have no reward: the most common reason, and how often it occurs.

    Cancelled rollouts are spoken of only if there is nothing else: over-sampled groups have some on purpose.
    """
    lost = [rollout for group in groups for rollout in group.rollouts if not rollout.ok]
    if not lost:
        return "the rollout source returned no rollouts"
    failed = [rollout for rollout in lost if rollout.outcome is not Outcome.CANCELLED]
    cause, count = Counter(_cause(rollout) for rollout in failed or lost).most_common(1)[0]
    return f"most often ({count} times): {cause}"


def _cause(rollout: Rollout) -> str:
    if rollout.failure is not None:
        return f"{rollout.failure.error} in {rollout.failure.where}: {rollout.failure.message}"
    if rollout.outcome is Outcome.CANCELLED:
        return "cancelled"
    return f"outcome {rollout.outcome.value!r} without a reward (is there a verifier?)"
