"""Group-relative advantages: pure arithmetic on the rewards of groups."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

from gym_sdk.errors import ConfigurationError

__all__ = ["group_advantages"]


def group_advantages(
    rewards: Sequence[float | None],
    group_ids: Sequence[Hashable] | None = None,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std", "none", "batch"] = "std",
    epsilon: float = 1e-6,
) -> list[float | None]:
    """Compute each rollout's advantage over its group.

    With baseline b_i and the population standard deviation s of the group's valid rewards:
    `A_i = (r_i - b_i) / (s + epsilon)` (GRPO, arXiv 2402.03300, section 4.1.2); without the division for
    `scale="none"` (Dr. GRPO, arXiv 2503.20783); with the deviation of all valid rewards of the call, whatever
    their group, for `scale="batch"` (arXiv 2508.08221), which keeps the weight between groups:
    a group whose rewards hardly differ is not blown up to the size of the others.
    `leave_one_out` takes as b_i the mean of the others (RLOO, arXiv 2402.14740), which makes the distance
    n / (n - 1) times that from the mean.

    Small groups, by their number n of valid rewards:

    - n = 0: every entry is None.
    - n = 1: nothing to compare; 0, whatever the baseline and the scale.
    - n = 2: `scale="std"` makes the advantages plus and minus 1, however small the difference (twice that
      with `leave_one_out`, whose baseline is the other reward); with "none" and "batch" the size matters.
    - a group without variance: 0. A deviation of few values is itself noisy: prefer "batch" or "none" for
      groups below about 4.

    Args:
        rewards: one entry for each rollout; None marks a rollout without reward, which stays out of every
            mean and deviation.
        group_ids: the group of each rollout, in the order of `rewards`; members of a group need not be
            neighbours. None: all are one group.
        baseline: what to subtract.
        scale: what to divide by.
        epsilon: keeps the division finite.

    Returns:
        One entry for each reward, None where the reward is None.

    Raises:
        ConfigurationError: a reward is NaN or infinite (the message names its index and group), there are
            more or fewer ids than rewards, or a setting is unknown.
    """
    _check(rewards, group_ids, baseline, scale, epsilon)
    members: dict[Hashable, list[tuple[int, float]]] = {}
    for index, reward in enumerate(rewards):
        if reward is not None:
            members.setdefault(None if group_ids is None else group_ids[index], []).append((index, reward))
    batch_deviation = _deviation([reward for group in members.values() for _, reward in group])
    advantages: list[float | None] = [None] * len(rewards)
    for group in members.values():
        valid = [reward for _, reward in group]
        divisor = 1.0
        if scale != "none":
            divisor = epsilon + (batch_deviation if scale == "batch" else _deviation(valid))
        for (index, _), distance in zip(group, _distances(valid, baseline), strict=True):
            advantages[index] = distance / divisor
    return advantages


def _distances(valid: Sequence[float], baseline: str) -> list[float]:
    """Subtract the baseline; exactly 0 without variance, which rounding of the mean would hide."""
    count, total = len(valid), sum(valid)
    if max(valid) == min(valid):
        return [0.0] * count
    if baseline == "mean":
        return [reward - total / count for reward in valid]
    return [reward - (total - reward) / (count - 1) for reward in valid]


def _deviation(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _check(
    rewards: Sequence[float | None],
    group_ids: Sequence[Hashable] | None,
    baseline: str,
    scale: str,
    epsilon: float,
) -> None:
    if baseline not in ("mean", "leave_one_out"):
        raise ConfigurationError(f"baseline must be 'mean' or 'leave_one_out', not {baseline!r}")
    if scale not in ("std", "none", "batch"):
        raise ConfigurationError(f"scale must be 'std', 'none' or 'batch', not {scale!r}")
    if not 0.0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon must be positive and finite, not {epsilon}")
    if group_ids is not None and len(group_ids) != len(rewards):
        raise ConfigurationError(
            f"{len(group_ids)} group_ids for {len(rewards)} rewards; each needs exactly one"
        )
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            group = "" if group_ids is None else f" of group {group_ids[index]!r}"
            raise ConfigurationError(
                f"reward {index}{group} is {reward}; it must be finite, or None for a rollout without reward"
            )
