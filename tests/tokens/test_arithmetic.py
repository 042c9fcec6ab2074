"""Properties of packing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError
from gym_sdk.tokens import pack_by_budget


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
