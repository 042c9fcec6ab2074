"""Collected rollouts, and what they say in numbers."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import Group, Outcome, Rollout
from gym_sdk.tokens import TokenSequence

__all__ = ["Collection", "pass_at_k"]


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Estimate the chance that at least one of k attempts is correct, without bias.

    `1 - C(total - correct, k) / C(total, k)` (Chen et al., arXiv 2107.03374, section 2.1).

    Args:
        correct: attempts that were correct, c.
        total: attempts made, n >= k.
        k: attempts allowed.

    Raises:
        ValueError: k is not in 1..total, or correct is not in 0..total.
    """
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise ValueError(
            f"pass_at_k needs 1 <= k <= total and 0 <= correct <= total: {correct=} {total=} {k=}"
        )
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


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


@dataclass(slots=True, repr=False)
class Collection:
    """The result of `client.collect`."""

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
        rewards = self.rewards
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def reward_error(self) -> float | None:
        """Standard error of `mean_reward`, clustered by task; None with fewer than two tasks.

        Rollouts of one task are not independent, so the groups' means are what is averaged over.
        """
        means = [group.mean_reward for group in self.groups]
        values = [mean for mean in means if mean is not None]
        if len(values) < 2:
            return None
        centre = sum(values) / len(values)
        variance = sum((value - centre) ** 2 for value in values) / (len(values) - 1)
        return math.sqrt(variance / len(values))

    def pass_at(self, k: int, *, threshold: float = 1.0) -> float | None:
        """Return pass@k, averaged over the groups that have at least k rollouts with a reward.

        Args:
            k: attempts allowed.
            threshold: a rollout is correct from this reward on.
        """
        values = [
            pass_at_k(sum(reward >= threshold for reward in group.rewards), len(group.rewards), k)
            for group in self.groups
            if len(group.rewards) >= k
        ]
        return sum(values) / len(values) if values else None

    def sequences(self) -> list[TokenSequence]:
        """Return the training rows of all groups, with their advantages."""
        return [row for group in self.groups for row in group.sequences()]

    def summary(self) -> dict[str, float]:
        """Return the numbers of this collection by name."""
        rollouts = self.rollouts
        outcomes = Counter(rollout.outcome for rollout in rollouts)
        calls = [call.tokens for rollout in rollouts for call in rollout.model_calls if call.tokens]
        generated = sum(len(tokens.generation_token_ids) for tokens in calls)
        numbers: dict[str, float | None] = {
            "tasks": len(self.groups),
            "rollouts": len(rollouts),
            "mean_reward": self.mean_reward,
            "reward_error": self.reward_error,
            **{str(outcome): outcomes[outcome] for outcome in Outcome},
            "model_calls": sum(len(rollout.model_calls) for rollout in rollouts),
            "tool_calls": sum(rollout.metrics.get("tool_calls", 0.0) for rollout in rollouts),
            "tool_errors": sum(rollout.metrics.get("tool_errors", 0.0) for rollout in rollouts),
            "generated_tokens": generated,
            **_token_numbers(rollouts),
            "duration_s": self.duration_s,
        }
        largest = max((len(group.rewards) for group in self.groups), default=0)
        for k in (1, 2, 4, 8, 16, 32, 64):
            if k <= largest:
                numbers[f"pass@{k}"] = self.pass_at(k)
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
        rows = self._rows(limit)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        hidden = len(self.rollouts) - limit
        if hidden > 0:
            lines.append(f"... and {hidden} more")
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        mean = "none" if self.mean_reward is None else f"{self.mean_reward:.4g}"
        return f"<Collection of {len(self.groups)} tasks, {len(self.rollouts)} rollouts, mean reward {mean}>"

    def __str__(self) -> str:
        numbers = "  ".join(f"{name}={value:.4g}" for name, value in self.summary().items())
        failed = "".join(f"\n  {count} x {what}" for what, count in self.failure_counts().items())
        return f"{self.table()}\n\n{numbers}{failed}"

    def _repr_html_(self) -> str:
        head, *body = self._rows(20)
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
        )
        numbers = ", ".join(
            f"{html.escape(name)} <b>{value:.4g}</b>" for name, value in self.summary().items()
        )
        return f"<p>{numbers}</p><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"

    def _rows(self, limit: int) -> Sequence[tuple[str, ...]]:
        rows = [("task", "#", "outcome", "reward", "calls", "tools", "answer")]
        for rollout in self.rollouts[:limit]:
            outcome = str(rollout.outcome)
            if rollout.truncation is not None:
                outcome += f" ({rollout.truncation})"
            answer = rollout.output_text
            if rollout.failure is not None:
                answer = f"{rollout.failure.error}: {rollout.failure.message}"
            rows.append(
                (
                    rollout.task_id,
                    str(rollout.index),
                    outcome,
                    "-" if rollout.reward is None else f"{rollout.reward:g}",
                    str(len(rollout.model_calls)),
                    f"{rollout.metrics.get('tool_calls', 0.0):g}",
                    _short(answer),
                )
            )
        return rows


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
