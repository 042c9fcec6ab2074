"""The estimates against their definitions: every k-subset of the attempts, one by one."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scored import group_of, scored

from gym_sdk.metrics import (
    best_at,
    best_at_k,
    final_number,
    final_text,
    majority_at,
    majority_at_k,
    mean_reward,
    pass_at,
    pass_at_k,
    pass_hat,
    pass_hat_k,
)
from gym_sdk.metrics import majority as majority_module

marks = st.lists(st.booleans(), min_size=1, max_size=8)
rewards = st.lists(st.floats(-10, 10), min_size=1, max_size=8)
attempts = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c", 4]), st.booleans()), min_size=1, max_size=8
)


def mean_over_subsets(count: int, k: int, value: Callable[[Sequence[int]], float]) -> float:
    return statistics.fmean(value(subset) for subset in itertools.combinations(range(count), k))


@given(marks, st.data())
def test_pass_at_k_and_pass_hat_k_are_means_over_all_subsets(ok: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(ok)))
    some = mean_over_subsets(len(ok), k, lambda subset: float(any(ok[i] for i in subset)))
    every = mean_over_subsets(len(ok), k, lambda subset: float(all(ok[i] for i in subset)))
    assert pass_at_k(sum(ok), len(ok), k) == pytest.approx(some)
    assert pass_hat_k(sum(ok), len(ok), k) == pytest.approx(every)


@given(rewards, st.data())
def test_best_at_k_is_the_mean_of_the_greatest(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    expected = mean_over_subsets(len(values), k, lambda subset: max(values[i] for i in subset))
    assert best_at_k(values, k) == pytest.approx(expected, abs=1e-9)


def vote(answers: Sequence[Hashable], credit: dict[Hashable, float], subset: Sequence[int]) -> float:
    votes = Counter(answers[i] for i in subset if answers[i] is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return statistics.fmean(credit[answer] for answer in winners) if winners else 0.0


@given(attempts, st.data())
def test_majority_at_k_is_the_mean_over_all_subsets(
    made: list[tuple[Hashable, bool]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(made)))
    answers = [answer for answer, _ in made]
    credit = {
        answer: statistics.fmean(ok for other, ok in made if other == answer) for answer in set(answers)
    }
    expected = mean_over_subsets(len(made), k, lambda subset: vote(answers, credit, subset))
    assert majority_at_k(answers, [ok for _, ok in made], k) == pytest.approx(expected)


def test_majority_of_many_is_drawn_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [str(n % 5) for n in range(40)]
    correct = [answer in "01" for answer in answers]
    exact = majority_at_k(answers, correct, 9)
    monkeypatch.setattr(majority_module, "_MOST_STEPS", 0)
    drawn = majority_at_k(answers, correct, 9)
    assert drawn == pytest.approx(exact, abs=0.025)  # five standard errors
    assert drawn != exact
    assert drawn == majority_at_k(answers, correct, 9)
    assert drawn != majority_at_k(answers, correct, 9, seed=1)


def test_best_at_k_of_zeros_and_ones_is_pass_at_k() -> None:
    assert best_at_k([0.0, 1.0, 0.0, 0.0, 1.0], 3) == pytest.approx(pass_at_k(2, 5, 3))


def test_estimates_of_large_groups_do_not_overflow() -> None:
    assert 0.0 < pass_at_k(1, 10_000, 5_000) < 1.0
    assert 0.0 < pass_hat_k(9_999, 10_000, 5_000) < 1.0
    assert best_at_k([1.0] * 3_000, 1_500) == pytest.approx(1.0)
    assert majority_at_k(["a"] * 2_000, [True] * 2_000, 3) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [0, 3])
def test_what_cannot_be_estimated_is_refused(k: int) -> None:
    for estimate in (
        lambda: pass_at_k(1, 2, k),
        lambda: pass_hat_k(1, 2, k),
        lambda: best_at_k([1.0, 0.0], k),
        lambda: majority_at_k(["a", "b"], [True, False], k),
    ):
        with pytest.raises(ValueError, match="needs 1 <= k"):
            estimate()
    with pytest.raises(ValueError, match="0 <= correct <= total"):
        pass_hat_k(3, 2, 1)
    with pytest.raises(ValueError, match="marks"):
        majority_at_k(["a", "b"], [True], 1)
    with pytest.raises(ValueError, match="at least 1"):
        pass_at([group_of([1.0])], 0)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), min_size=2, max_size=6))
def test_the_error_of_the_mean_is_clustered_by_task(tasks: list[list[float]]) -> None:
    found = mean_reward([group_of(values) for values in tasks])
    everything = [value for values in tasks for value in values]
    mean = statistics.fmean(everything)
    squares = sum(sum(value - mean for value in values) ** 2 for values in tasks)
    error = math.sqrt(squares * len(tasks) / (len(tasks) - 1)) / len(everything)
    assert found.value == pytest.approx(mean, abs=1e-9)
    assert found.error == pytest.approx(error, abs=1e-5)


def test_the_error_keeps_its_digits_far_from_zero() -> None:
    near = mean_reward([group_of([0.0, 1.0]), group_of([1.0, 1.0]), group_of([0.0])])
    far = mean_reward([group_of([1e6, 1e6 + 1]), group_of([1e6 + 1, 1e6 + 1]), group_of([1e6])])
    assert near.error is not None
    assert far.error == pytest.approx(near.error, rel=1e-6)


def test_for_equal_groups_it_is_the_error_of_the_mean_of_means() -> None:
    tasks = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.0]]
    means = [statistics.fmean(values) for values in tasks]
    found = mean_reward([group_of(values) for values in tasks])
    assert found.error == pytest.approx(statistics.stdev(means) / 2)
    interval = found.interval()
    assert interval is not None
    assert found.error is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 1.959964 * found.error)


def test_rollouts_without_reward_are_left_out_and_never_zero() -> None:
    groups = [group_of([1.0, None, 1.0]), group_of([None, None, None]), group_of([1.0, None, None])]
    reward = mean_reward(groups)
    assert (reward.value, reward.tasks, reward.left_out) == (1.0, 2, 1)
    for estimate in (pass_at, pass_hat, best_at, majority_at):
        found = estimate(groups, 2)
        assert (found.tasks, found.left_out) == (1, 2), estimate
    assert pass_hat(groups, 1).value == 1.0
    assert str(pass_hat(groups, 1)) == "1 ± 0"
    nobody = pass_at(groups, 3)
    assert (nobody.value, nobody.error, nobody.interval(), str(nobody)) == (None, None, None, "-")


def test_majority_votes_by_what_a_rollout_answers() -> None:
    texts = ["so it is 5", "5.0", "I say 7", "no idea"]
    group = group_of([1.0, 1.0, 0.0, 0.0], texts=texts)
    assert majority_at([group], 4, answer_of=final_number).value == 1.0
    assert majority_at([group], 4, answer_of=final_text).value == pytest.approx(0.5)  # four different texts
    assert final_number(scored(0.0, "none")) is None
    assert final_text(scored(0.0, "  \n")) is None


def test_the_estimate_does_not_depend_on_the_order() -> None:
    answers = ["a", "a", "b", "b", "c"]
    correct = [True, True, False, False, False]
    order = list(range(5))
    values = set()
    for _ in range(5):
        random.Random(len(values)).shuffle(order)
        values.add(round(majority_at_k([answers[i] for i in order], [correct[i] for i in order], 3), 12))
    assert len(values) == 1
