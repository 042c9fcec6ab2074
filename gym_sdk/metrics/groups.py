"""Estimates over the groups of a run: a value for each task, their mean, and its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gym_sdk.metrics.estimates import best_at_k, pass_at_k, pass_hat_k
from gym_sdk.metrics.majority import AnswerOf, final_text, majority_at_k
from gym_sdk.schema import Group

__all__ = ["Estimate", "RewardMoments", "best_at", "majority_at", "mean_reward", "pass_at", "pass_hat"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks, and how sure it is."""

    value: float | None
    """The mean; None if no task counted."""
    error: float | None
    """Its standard error, with tasks as the unit; None with fewer than two tasks that counted."""
    tasks: int
    """Tasks that counted."""
    left_out: int
    """Tasks that did not: fewer than k of their rollouts have a reward (or none, for a mean of rewards)."""

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Return the confidence interval `value ± z * error`, or None without an error.

        By the central limit theorem over tasks (Miller, arXiv 2411.00640, section 2); too narrow with fewer
        than about 30 tasks.

        Args:
            level: the share of such intervals that hold the true value, in (0, 1).
        """
        if self.value is None or self.error is None:
            return None
        from statistics import NormalDist  # only here: it loads decimal and fractions

        half = NormalDist().inv_cdf(0.5 + level / 2.0) * self.error
        return self.value - half, self.value + half

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.4g}" if self.error is None else f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(slots=True)
class RewardMoments:
    """The sums behind a mean reward and its standard error, clustered by task; the size never grows.

    With m tasks, n_c rewards of task c that sum up to S_c, and the mean r over all n rewards, the squared
    standard error is `m / (m - 1) * sum_c (S_c - n_c * r)^2 / n^2`: the cluster-robust one (Miller, arXiv
    2411.00640, section 2.2) with the usual correction for few clusters. For groups of the same size it is the
    standard error of the mean over the groups' means.
    """

    tasks: int = 0
    left_out: int = 0
    rewards: int = 0
    total: float = 0.0
    _origin: float = 0.0  # the first group's mean: near it, differences of squares lose no digits
    _sum_squares: float = 0.0  # of S_c
    _sizes_squares: float = 0.0  # of n_c
    _products: float = 0.0  # of S_c * n_c

    def add(self, rewards: Sequence[float]) -> None:
        """Count the rewards of one task; a task without any is only counted as left out."""
        count = len(rewards)
        if not count:
            self.left_out += 1
            return
        if not self.tasks:
            self._origin = math.fsum(rewards) / count
        total = math.fsum(rewards)
        shifted = total - count * self._origin
        self.tasks += 1
        self.rewards += count
        self.total += total
        self._sum_squares += shifted * shifted
        self._sizes_squares += count * count
        self._products += shifted * count

    def estimate(self) -> Estimate:
        """Return the mean over all rewards, and its standard error."""
        if not self.rewards:
            return Estimate(None, None, 0, self.left_out)
        mean = self.total / self.rewards
        error = None
        if self.tasks > 1:
            r = mean - self._origin
            squares = self._sum_squares - 2.0 * r * self._products + r * r * self._sizes_squares
            correction = self.tasks / (self.tasks - 1)
            error = math.sqrt(max(0.0, squares) * correction) / self.rewards
        return Estimate(mean, error, self.tasks, self.left_out)


def mean_reward(groups: Iterable[Group]) -> Estimate:
    """Return the mean over all rewards, with its standard error clustered by task (`RewardMoments`)."""
    moments = RewardMoments()
    for group in groups:
        moments.add(group.rewards)
    return moments.estimate()


def pass_at(groups: Iterable[Group], k: int, *, threshold: float = 1.0) -> Estimate:
    """Return pass@k, averaged over the groups that have at least k rewards.

    Args:
        groups: what was rolled out.
        k: attempts allowed.
        threshold: a rollout is correct from this reward on.
    """
    return _over(groups, k, lambda group: pass_at_k(*_counts(group, threshold), k))


def pass_hat(groups: Iterable[Group], k: int, *, threshold: float = 1.0) -> Estimate:
    """Return pass^k, averaged over the groups that have at least k rewards.

    Args:
        groups: what was rolled out.
        k: attempts that all have to be correct.
        threshold: a rollout is correct from this reward on.
    """
    return _over(groups, k, lambda group: pass_hat_k(*_counts(group, threshold), k))


def best_at(groups: Iterable[Group], k: int) -> Estimate:
    """Return the greatest of k rewards, averaged over the groups that have at least k rewards."""
    return _over(groups, k, lambda group: best_at_k(group.rewards, k))


def majority_at(
    groups: Iterable[Group], k: int, *, answer_of: AnswerOf = final_text, threshold: float = 1.0
) -> Estimate:
    """Return majority@k, averaged over the groups that have at least k rewards.

    Args:
        groups: what was rolled out.
        k: attempts that vote.
        answer_of: reads a rollout's answer, e.g. `final_number`.
        threshold: a rollout is correct from this reward on.
    """

    def value(group: Group) -> float:
        scored = [(answer_of(rollout), rollout.reward) for rollout in group.rollouts]
        marks = [(answer, reward >= threshold) for answer, reward in scored if reward is not None]
        return majority_at_k([answer for answer, _ in marks], [ok for _, ok in marks], k)

    return _over(groups, k, value)


def _counts(group: Group, threshold: float) -> tuple[int, int]:
    rewards = group.rewards
    return sum(reward >= threshold for reward in rewards), len(rewards)


def _over(groups: Iterable[Group], k: int, value: Callable[[Group], float]) -> Estimate:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    moments = RewardMoments()
    for group in groups:
        moments.add([value(group)] if len(group.rewards) >= k else [])
    return moments.estimate()
