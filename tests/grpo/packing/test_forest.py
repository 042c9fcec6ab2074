"""Segments hold common beginnings once, and paths through them are the rows again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from support.packed_rows import row_families

from gym_sdk.grpo.packing.forest import MIN_SHARED, Forest, build_forest
from gym_sdk.grpo.packing.layout import make_layout
from gym_sdk.tokens import TokenSequence


def read(forest: Forest, rows: list[list[int]], path: tuple[int, ...]) -> list[int]:
    parts = [forest.segments[number] for number in path]
    return [token for part in parts for token in rows[part.row][part.start : part.stop]]


@settings(max_examples=60, deadline=None)
@given(row_families())
def test_paths_spell_the_rows_and_tokens_are_few(family: list[TokenSequence]) -> None:
    rows = [row.token_ids for row in family]
    forest = build_forest(rows)
    assert [read(forest, rows, path) for path in forest.paths] == rows
    distinct = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    most = len(distinct) + (MIN_SHARED - 1) * (len(rows) - 1)
    assert len(distinct) <= forest.tokens <= min(most, sum(map(len, rows)))
    for number, segment in enumerate(forest.segments):
        readers = sum(number in path for path in forest.paths)
        assert readers == 1 or len(segment) >= MIN_SHARED or tuple(rows[segment.row]) in map(tuple, rows)
        for path in forest.paths:
            if number in path:
                place = path.index(number)
                assert segment.parent == (path[place - 1] if place else None)


@settings(max_examples=60, deadline=None)
@given(row_families())
def test_a_token_sees_its_own_path_up_to_itself(family: list[TokenSequence]) -> None:
    forest = build_forest([row.token_ids for row in family])
    layout = make_layout(forest)
    expected = torch.zeros(forest.tokens, forest.tokens, dtype=torch.bool)
    for path in forest.paths:
        places = [place for number in path for place in range(*layout.spans[number][:2])]
        for end, place in enumerate(places):
            expected[place, places[: end + 1]] = True
    assert torch.equal(layout.visible(), expected)
    met = torch.zeros(forest.tokens, forest.tokens, dtype=torch.long)
    for queries, keys, is_own in layout.reads():
        part = torch.ones(met[queries, keys].shape, dtype=torch.long)
        met[queries, keys] += part.tril() if is_own else part
    assert torch.equal(met, expected.long())


def test_a_group_shares_its_prompt() -> None:
    prompt = list(range(100))
    rows = [prompt + [200 + number] * (5 + number) for number in range(4)]
    forest = build_forest(rows)
    assert forest.tokens == 100 + 5 + 6 + 7 + 8
    assert forest.paths == ((0, 1), (0, 2), (0, 3), (0, 4))
    assert make_layout(forest).longest == 108
    apart = build_forest(rows, share_prefixes=False)
    assert apart.tokens == sum(map(len, rows))
    assert apart.paths == ((0,), (1,), (2,), (3,))


def test_equal_rows_and_beginnings_of_rows_cost_nothing() -> None:
    row = list(range(30))
    forest = build_forest([row, row, row[:20], []])
    assert forest.tokens == 30
    assert forest.paths == ((0, 1), (0, 1), (0,), ())


@pytest.mark.parametrize(("common", "tokens"), [(MIN_SHARED, 20 - MIN_SHARED), (MIN_SHARED - 1, 20)])
def test_short_beginnings_are_copied(common: int, tokens: int) -> None:
    rows = [[1] * common + [number] * (10 - common) for number in (2, 3)]
    assert build_forest(rows).tokens == tokens
