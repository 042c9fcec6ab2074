"""Micro-batches: every row once, within the budget, what shares together, near-equal."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_rows import make_row, row_families

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.packing import pack_rows, plan_micro_batches
from gym_sdk.tokens import TokenSequence


def make_group(prompt: int, sizes: list[int], seed: int) -> list[TokenSequence]:
    draw = random.Random(seed)
    start = [draw.randrange(1000) for _ in range(prompt)]
    return [
        make_row(start + [draw.randrange(1000) for _ in range(size)], [0] * prompt + [1] * size)
        for size in sizes
    ]


def packed_tokens(rows: list[TokenSequence], batch: list[int], share_prefixes: bool = True) -> int:
    return len(pack_rows([rows[index] for index in batch], share_prefixes=share_prefixes).input_ids)


@settings(max_examples=60, deadline=None)
@given(row_families(), st.integers(1, 80), st.booleans())
def test_every_row_once_within_the_budget(
    rows: list[TokenSequence], max_tokens: int, share_prefixes: bool
) -> None:
    plan = plan_micro_batches(rows, max_tokens, share_prefixes=share_prefixes)
    assert sorted(index for batch in plan for index in batch) == list(range(len(rows)))
    assert plan == plan_micro_batches(list(rows), max_tokens, share_prefixes=share_prefixes)
    for batch in plan:
        assert batch == sorted(batch)
        assert len(batch) > 0
        if len(batch) > 1:
            assert packed_tokens(rows, batch, share_prefixes) <= max_tokens


def test_groups_stay_together_whatever_the_order_of_rows() -> None:
    groups = [make_group(100, [20] * 8, seed) for seed in range(8)]
    rows = [group[number] for number in range(8) for group in groups]
    plan = plan_micro_batches(rows, 600)
    assert sorted(len(batch) for batch in plan) == [16] * 4
    for batch in plan:
        assert len({index % 8 for index in batch}) == 2
    assert len(plan_micro_batches(rows, 600, share_prefixes=False)) >= 64 * 119 / 600


def test_micro_batches_are_near_equal() -> None:
    draw = random.Random(1)
    rows = [make_group(5, [draw.randrange(50, 150)], seed)[0] for seed in range(100)]
    plan = plan_micro_batches(rows, 4000)
    tokens = [packed_tokens(rows, batch) for batch in plan]
    assert len(plan) == -(-sum(tokens) // 4000)
    assert max(tokens) - min(tokens) <= 0.02 * max(tokens)


def test_a_group_over_the_budget_is_divided_and_a_row_over_it_is_alone() -> None:
    rows = [*make_group(100, [50] * 8, 0), *make_group(5, [400], 1)]
    plan = plan_micro_batches(rows, 300)
    assert plan[0] == [8]
    assert [len(batch) for batch in plan] == [1, 4, 4]
    assert sum(packed_tokens(rows, batch) for batch in plan[1:]) == 2 * 100 + 8 * 49


def test_rows_that_train_nothing_are_planned() -> None:
    assert plan_micro_batches([make_row([1, 2], [0, 0])] * 3, 10) == [[0, 1, 2]]
    assert plan_micro_batches([], 10) == []


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_tokens must be positive, not 0"):
        plan_micro_batches([], 0)
