"""Properties of advantages and packing."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError
from gym_sdk.tokens import group_advantages, pack_by_budget

rewards = st.lists(st.none() | st.floats(-100, 100), max_size=12)


@given(rewards, st.sampled_from(["mean", "leave_one_out"]), st.sampled_from(["std", "none"]))
def test_advantages_follow_the_formula(values: list[float | None], baseline: str, scale: str) -> None:
    result = group_advantages(values, baseline=baseline, scale=scale)
    valid = [value for value in values if value is not None]
    assert [entry is None for entry in result] == [value is None for value in values]
    for value, entry in zip(values, result, strict=True):
        if value is None:
            continue
        assert entry is not None
        if len(valid) < 2 or len(set(valid)) == 1:
            assert entry == 0.0
            continue
        others = list(valid)
        others.remove(value)
        base = statistics.fmean(others if baseline == "leave_one_out" else valid)
        divisor = statistics.pstdev(valid) + 1e-6 if scale == "std" else 1.0
        assert entry == pytest.approx((value - base) / divisor, rel=1e-6, abs=1e-6)


@given(rewards)
def test_advantages_ignore_rollouts_without_reward(values: list[float | None]) -> None:
    valid = [value for value in values if value is not None]
    kept = [entry for entry in group_advantages(values) if entry is not None]
    assert kept == group_advantages(valid)
    assert sum(kept) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ConfigurationError, match="must be finite"):
        group_advantages([1.0, reward])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_packing_keeps_every_row_once_and_the_budget(lengths: list[int], budget: int) -> None:
    batches = pack_by_budget(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        cost = len(batch) * max(lengths[index] for index in batch)
        assert cost <= budget or len(batch) == 1
    for earlier, later in itertools.pairwise(batches):
        assert min(lengths[i] for i in earlier) >= max(lengths[i] for i in later)


def test_packing_refuses_a_budget_that_is_not_positive() -> None:
    with pytest.raises(ConfigurationError, match="positive"):
        pack_by_budget([1], 0)
