"""Group-relative advantages: pure arithmetic on the rewards of one group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from gym_sdk.errors import ConfigurationError

__all__ = ["group_advantages"]


def group_advantages(
    rewards: Sequence[float | None],
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["std", "none"] = "std",
    epsilon: float = 1e-6,
) -> list[float | None]:
    """Compute each rollout's advantage over its group.

    With baseline b_i and the population standard deviation s of the valid rewards:
    `A_i = (r_i - b_i) / (s + epsilon)` (GRPO, arXiv 2402.03300, section 4.1.2), or without the division
    for `scale="none"` (Dr. GRPO, arXiv 2503.20783). `leave_one_out` takes as b_i the mean of the others
    (RLOO, arXiv 2402.14740), which is n / (n - 1) times the distance from the mean: twice for a group of
    two. With a deviation of two values, `scale="std"` makes both advantages of a pair plus and minus 1,
    however small their difference.

    Args:
        rewards: one entry for each rollout of the group; None marks a rollout without reward, which stays
            out of the mean and the standard deviation.
        baseline: what to subtract.
        scale: what to divide by.
        epsilon: keeps the division finite.

    Returns:
        One entry for each reward, None where the reward is None. A group with fewer than two valid
        rewards, or without variance, has nothing to compare: its advantages are 0.

    Raises:
        ConfigurationError: a reward is NaN or infinite.
    """
    valid = [reward for reward in rewards if reward is not None]
    for reward in valid:
        if not math.isfinite(reward):
            raise ConfigurationError(f"a reward is {reward}; it must be finite (or None for no reward)")
    count = len(valid)
    if count < 2 or max(valid) == min(valid):
        return [None if reward is None else 0.0 for reward in rewards]
    total = sum(valid)
    mean = total / count
    std = (sum((reward - mean) ** 2 for reward in valid) / count) ** 0.5
    divisor = std + epsilon if scale == "std" else 1.0

    def advantage(reward: float) -> float:
        base = mean if baseline == "mean" else (total - reward) / (count - 1)
        return (reward - base) / divisor

    return [None if reward is None else advantage(reward) for reward in rewards]
