"""Properties of group advantages, against the formulas written with the statistics module."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError
from gym_sdk.tokens import group_advantages

rewards = st.lists(st.none() | st.floats(-100, 100), max_size=12)
labelled = st.lists(st.tuples(st.none() | st.floats(-100, 100), st.sampled_from("abc")), max_size=15)
baselines = st.sampled_from(["mean", "leave_one_out"])
scales = st.sampled_from(["std", "none", "batch"])


@settings(max_examples=100, deadline=None)
@given(labelled, baselines, scales)
def test_advantages_follow_the_formula(
    rows: list[tuple[float | None, str]], baseline: Any, scale: Any
) -> None:
    values, groups = [row[0] for row in rows], [row[1] for row in rows]
    result = group_advantages(values, groups, baseline=baseline, scale=scale)
    everything = [value for value in values if value is not None]
    for (value, label), entry in zip(rows, result, strict=True):
        if value is None:
            assert entry is None
            continue
        assert entry is not None
        valid = [other for other, name in rows if name == label and other is not None]
        if len(valid) < 2 or len(set(valid)) == 1:
            assert entry == 0.0
            continue
        others = list(valid)
        others.remove(value)
        base = statistics.fmean(others if baseline == "leave_one_out" else valid)
        spread = {"std": valid, "batch": everything}.get(scale)
        divisor = 1.0 if spread is None else statistics.pstdev(spread) + 1e-6
        assert entry == pytest.approx((value - base) / divisor, rel=1e-6, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(labelled, baselines, st.sampled_from(["std", "none"]), st.randoms())
def test_groups_do_not_see_each_other(
    rows: list[tuple[float | None, str]], baseline: Any, scale: Any, random: Any
) -> None:
    """By id, in any order, is what one call for each group gives."""
    random.shuffle(rows)
    together = group_advantages(
        [row[0] for row in rows], [row[1] for row in rows], baseline=baseline, scale=scale
    )
    for label in "abc":
        alone = group_advantages(
            [value for value, name in rows if name == label], baseline=baseline, scale=scale
        )
        assert [entry for entry, row in zip(together, rows, strict=True) if row[1] == label] == alone


@settings(max_examples=30, deadline=None)
@given(rewards, scales)
def test_rollouts_without_reward_change_nothing(values: list[float | None], scale: Any) -> None:
    valid = [value for value in values if value is not None]
    kept = [entry for entry in group_advantages(values, scale=scale) if entry is not None]
    assert kept == group_advantages(valid, scale=scale)
    assert sum(kept) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_small_groups(baseline: Any, scale: Any) -> None:
    def compute(*values: float | None) -> list[float | None]:
        return group_advantages(values, baseline=baseline, scale=scale)

    assert compute() == []
    assert compute(None, None) == [None, None]
    assert compute(None, 5.0) == [None, 0.0]
    assert compute(0.1, 0.1, 0.1) == [0.0, 0.0, 0.0]  # the mean of these is not 0.1
    size = 0.01 if scale == "none" else 1.0
    size *= 2.0 if baseline == "leave_one_out" else 1.0
    first, missing, last = compute(0.52, None, 0.5)
    assert missing is None
    assert [first, last] == pytest.approx([size, -size], rel=1e-3)


def test_batch_scale_keeps_the_weight_between_groups() -> None:
    values, groups = [0.0, 1.0, 0.5, 0.51], ["wide", "wide", 7, 7]
    by_group = group_advantages(values, groups, scale="std")
    by_batch = group_advantages(values, groups, scale="batch")
    assert by_group[1] == pytest.approx(by_group[3], rel=1e-3)
    assert by_batch[1] == pytest.approx(100 * by_batch[3])


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ConfigurationError, match=f"reward 1 is {reward}; it must be finite, or None"):
        group_advantages([1.0, reward])
    with pytest.raises(ConfigurationError, match="reward 2 of group 'task-7' is"):
        group_advantages([1.0, None, reward], ["task-6", "task-6", "task-7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_ids": ["a"]}, "1 group_ids for 2 rewards"),
        ({"baseline": "median"}, "baseline must be 'mean' or 'leave_one_out', not 'median'"),
        ({"scale": "range"}, "scale must be 'std', 'none' or 'batch', not 'range'"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, not 0.0"),
        ({"epsilon": math.inf}, "epsilon must be positive and finite"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        group_advantages([1.0, 2.0], **arguments)
