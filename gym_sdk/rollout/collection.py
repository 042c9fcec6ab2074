"""Collected rollouts, and what they say in numbers."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gym_sdk.metrics import (
    AnswerOf,
    GroupKey,
    RunMetrics,
    Table,
    final_text,
    group_table,
    majority_at,
    mean_reward,
    pass_at,
    pass_at_k,
    pass_hat,
    rollout_table,
)
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import Group, Outcome, Rollout
from gym_sdk.tokens import TokenSequence

__all__ = ["Collection", "pass_at_k"]

_KS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(slots=True, repr=False)
class Collection:
    """The result of `client.collect`.

    Numbers are over the rollouts that have a reward: one that failed or was cancelled never counts as 0.
    `gym_sdk.metrics` has the same estimates with their standard errors and with how many tasks were left out.
    """

    groups: list[Group] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, group by group."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def rewards(self) -> list[float]:
        """The rewards of the rollouts that have one."""
        return [reward for group in self.groups for reward in group.rewards]

    @property
    def failures(self) -> list[Rollout]:
        """The rollouts that failed; each says why in `failure`."""
        return [rollout for rollout in self.rollouts if rollout.outcome is Outcome.FAILED]

    @property
    def mean_reward(self) -> float | None:
        """Mean over the rollouts that have a reward; None if none has."""
        return mean_reward(self.groups).value

    @property
    def reward_error(self) -> float | None:
        """Standard error of `mean_reward`, clustered by task; None with fewer than two tasks.

        Rollouts of one task are not independent; `gym_sdk.metrics.mean_reward` has the formula.
        """
        return mean_reward(self.groups).error

    def pass_at(self, k: int, *, threshold: float = 1.0) -> float | None:
        """Return pass@k (at least one of k attempts is correct), averaged over tasks.

        Groups in which fewer than k rollouts have a reward are left out; None if that leaves none.

        Args:
            k: attempts allowed.
            threshold: a rollout is correct from this reward on.
        """
        return pass_at(self.groups, k, threshold=threshold).value

    def pass_hat(self, k: int, *, threshold: float = 1.0) -> float | None:
        """Return pass^k (all of k attempts are correct), averaged over tasks as in `pass_at`."""
        return pass_hat(self.groups, k, threshold=threshold).value

    def majority_at(
        self, k: int, *, answer_of: AnswerOf = final_text, threshold: float = 1.0
    ) -> float | None:
        """Return majority@k (the most frequent of k answers is correct), averaged over tasks as in `pass_at`.

        Args:
            k: attempts that vote.
            answer_of: reads a rollout's answer: the final text, `gym_sdk.metrics.final_number`, or your own.
            threshold: a rollout is correct from this reward on.
        """
        return majority_at(self.groups, k, answer_of=answer_of, threshold=threshold).value

    def by_tag(self, by: GroupKey | None = None, *, ks: Sequence[int] = (), threshold: float = 1.0) -> Table:
        """Return a table with a row for each tag of the tasks (`task.metadata["tags"]`).

        Args:
            by: what else to split by, e.g. `lambda task: task.metadata["level"]`; the row's name, or names.
            ks: the columns pass@k.
            threshold: a rollout is correct from this reward on.
        """
        return group_table(self.groups, by=by, ks=ks, threshold=threshold)

    def metrics(self) -> dict[str, float]:
        """Return all numbers under the names that trackers get (`docs/metrics.md`)."""
        return RunMetrics.of(self.groups, duration_s=self.duration_s).metrics()

    def sequences(self) -> list[TokenSequence]:
        """Return the training rows of all groups, with their advantages."""
        return [row for group in self.groups for row in group.sequences()]

    def summary(self) -> dict[str, float]:
        """Return the numbers of this collection that are worth a glance, by short names."""
        rollouts, reward = self.rollouts, mean_reward(self.groups)
        outcomes = Counter(rollout.outcome for rollout in rollouts)
        calls = [call.tokens for rollout in rollouts for call in rollout.model_calls if call.tokens]
        numbers: dict[str, float | None] = {
            "tasks": len(self.groups),
            "rollouts": len(rollouts),
            "mean_reward": reward.value,
            "reward_error": reward.error,
            **{str(outcome): outcomes[outcome] for outcome in Outcome},
            "model_calls": sum(len(rollout.model_calls) for rollout in rollouts),
            "tool_calls": sum(rollout.metrics.get("tool_calls", 0.0) for rollout in rollouts),
            "tool_errors": sum(rollout.metrics.get("tool_errors", 0.0) for rollout in rollouts),
            "generated_tokens": sum(len(tokens.generation_token_ids) for tokens in calls),
            **_token_numbers(rollouts),
            "duration_s": self.duration_s,
        }
        largest = max((len(group.rewards) for group in self.groups), default=0)
        numbers |= {f"pass@{k}": self.pass_at(k) for k in _KS if k <= largest}
        if self.duration_s > 0:
            numbers["rollouts_per_s"] = len(rollouts) / self.duration_s
        return {name: float(value) for name, value in numbers.items() if value is not None}

    def failure_counts(self) -> dict[str, int]:
        """Return how often each error ended a rollout, the most frequent first."""
        counts = Counter(
            f"{rollout.failure.error} in {rollout.failure.where}"
            for rollout in self.failures
            if rollout.failure is not None
        )
        return dict(counts.most_common())

    def table(self, limit: int = 20) -> str:
        """Return the first rollouts as an aligned text table."""
        return str(rollout_table(self.rollouts, limit=limit))

    def __repr__(self) -> str:
        mean = "none" if self.mean_reward is None else f"{self.mean_reward:.4g}"
        return f"<Collection of {len(self.groups)} tasks, {len(self.rollouts)} rollouts, mean reward {mean}>"

    def __str__(self) -> str:
        numbers = "  ".join(f"{name}={value:.4g}" for name, value in self.summary().items())
        failed = "".join(f"\n  {count} x {what}" for what, count in self.failure_counts().items())
        return f"{self.table()}\n\n{numbers}{failed}"

    def _repr_html_(self) -> str:
        numbers = ", ".join(
            f"{html.escape(name)} <b>{value:.4g}</b>" for name, value in self.summary().items()
        )
        return f"<p>{numbers}</p>{rollout_table(self.rollouts)._repr_html_()}"


def _token_numbers(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return rows, forks and the trained share of the rollouts whose model calls all carry tokens."""
    reports = [
        rollout.token_report()
        for rollout in rollouts
        if rollout.model_calls and all(call.tokens is not None for call in rollout.model_calls)
    ]
    numbers = TokenWatch.of(rollouts).metrics()
    if reports:
        generated = sum(report.generated_tokens for report in reports)
        trained = sum(report.trained_tokens for report in reports)
        numbers["sequences"] = sum(report.sequences for report in reports)
        numbers["trained_share"] = trained / generated if generated else 1.0
    return numbers
