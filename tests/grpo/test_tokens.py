"""Properties of what training stands on: advantages, packing, merging, and tensors."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo import group_advantages, pack_by_budget, to_tensors
from gym_sdk.tokens import CallTokens, TokenSequence, merge_calls

rewards = st.lists(st.none() | st.floats(-100, 100), max_size=12)
tokens = st.lists(st.integers(0, 3), max_size=4)


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


@st.composite
def histories(draw: st.DrawFn) -> list[CallTokens]:
    """Model calls whose prompts extend an earlier call, or fork from anywhere."""
    calls: list[CallTokens] = []
    for _ in range(draw(st.integers(0, 5))):
        base: list[int] = []
        if calls and draw(st.booleans()):
            base = draw(st.sampled_from(calls)).token_ids
            base = base[: draw(st.integers(0, len(base)))] if draw(st.booleans()) else base
        generation = draw(tokens)
        calls.append(CallTokens([*base, 3, *draw(tokens)], generation, [-0.5 * g for g in generation]))
    return calls


@given(histories())
def test_each_generated_token_carries_loss_in_exactly_one_row(calls: list[CallTokens]) -> None:
    rows = merge_calls(calls)
    assert sum(row.trained_tokens for row in rows) == sum(len(call.generation_token_ids) for call in calls)
    assert [row.forked for row in rows] == [index > 0 for index in range(len(rows))]
    taken: set[tuple[int, int]] = set()
    for call in calls:
        start, end = len(call.prompt_token_ids), len(call.token_ids)
        for number, row in enumerate(rows):
            places = {(number, position) for position in range(start, end)}
            if (
                row.token_ids[:end] == call.token_ids
                and row.log_probs[start:end] == call.generation_log_probs
                and all(row.loss_mask[start:end])
                and not taken & places
            ):
                taken |= places
                break
        else:
            pytest.fail(f"no row holds {call} with loss")
    for row in rows:
        assert all(value == 0.0 for value, flag in zip(row.log_probs, row.loss_mask, strict=True) if not flag)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5))
def test_an_unforked_history_is_one_row_equal_to_its_last_call(
    turns: list[tuple[list[int], list[int]]],
) -> None:
    calls: list[CallTokens] = []
    for new, generation in turns:
        prompt = (calls[-1].token_ids if calls else [3]) + new
        calls.append(CallTokens(prompt, generation, [-1.0] * len(generation)))
    (row,) = merge_calls(calls)
    assert row.token_ids == calls[-1].token_ids
    assert not row.forked


def test_tensors_are_padded_on_the_right() -> None:
    batch = to_tensors(
        [
            TokenSequence([5, 6, 7], [0, 1, 0], [0.0, -1.0, 0.0], advantage=2.0),
            TokenSequence([8, 9], [0, 1], [0.0, -3.0], advantage=-1.0),
        ]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, False]]
    assert batch.behaviour_log_probs.tolist() == [[0.0, -1.0, 0.0], [0.0, -3.0, 0.0]]
    assert batch.advantages.tolist() == [[0.0, 2.0, 0.0], [0.0, -1.0, 0.0]]
    assert batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ConfigurationError, "at least one row"),
        ([TokenSequence([1, 2], [0, 1], [0.0, -1.0])], ConfigurationError, "no advantage"),
        ([TokenSequence([1], [1], [-1.0], advantage=1.0)], TokenContractError, "starts with a sampled token"),
        ([TokenSequence([1, 2], [0], [0.0], advantage=1.0)], TokenContractError, "the same number of each"),
        ([TokenSequence([], [], [], advantage=1.0)], TokenContractError, "at least 1"),
    ],
)
def test_rows_that_cannot_be_laid_out(
    rows: list[TokenSequence], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        to_tensors(rows)
