"""What is in the three layouts: padded, flat, and packed with common beginnings once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from support.packed_rows import make_row, row_families

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo.packing import pack_rows, to_flat_tensors, to_tensors
from gym_sdk.tokens import TokenSequence

ROWS = [
    TokenSequence([5, 6, 7], [0, 1, 0], [0.0, -1.0, 0.0], advantage=2.0),
    TokenSequence([8, 9], [0, 1], [0.0, -3.0], advantage=-1.0),
]
LAYOUTS: list[Callable[[Sequence[TokenSequence]], object]] = [to_tensors, to_flat_tensors, pack_rows]


def test_padded_on_the_right() -> None:
    batch = to_tensors(ROWS)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, False]]
    assert batch.behaviour_log_probs.tolist() == [[0.0, -1.0, 0.0], [0.0, -3.0, 0.0]]
    assert batch.advantages.tolist() == [[0.0, 2.0, 0.0], [0.0, -1.0, 0.0]]
    assert batch.targets.tolist() == [6, 9]
    assert batch.predecessors.tolist() == [0, 3]
    assert batch.pair_index.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert batch.input_ids.dtype == torch.int64
    assert batch.advantages.dtype == torch.float32


def test_flat_without_padding() -> None:
    batch = to_flat_tensors(ROWS)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.row_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.cu_seq_lens.tolist() == [0, 3, 5]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.max_length == 3
    assert batch.loss_mask.tolist() == [False, True, False, False, True]
    assert batch.behaviour_log_probs.tolist() == [0.0, -1.0, 0.0, 0.0, -3.0]
    assert batch.advantages.tolist() == [0.0, 2.0, 0.0, 0.0, -1.0]


def test_packed_holds_only_what_trained_tokens_depend_on() -> None:
    batch = pack_rows(ROWS)
    assert batch.input_ids.tolist() == [5, 8]
    assert batch.position_ids.tolist() == [0, 0]
    assert batch.targets.tolist() == [6, 9]
    assert batch.predecessors.tolist() == [0, 1]
    assert batch.pair_index.tolist() == [[0], [1]]
    assert batch.behaviour_log_probs.tolist() == [[-1.0], [-3.0]]
    assert batch.advantages.tolist() == [[2.0], [-1.0]]


def test_rows_that_train_the_same_token_in_the_same_context_share_the_pair() -> None:
    ids = list(range(20))
    rows = [make_row(ids, [0] * 10 + [1] * 10, 0), make_row([*ids[:-1], 7], [0] * 12 + [1] * 8, 1)]
    batch = pack_rows(rows)
    assert len(batch.input_ids) == 19
    assert len(batch.targets) == 11  # ten of the first row; of the second's eight, one is another token
    assert batch.pair_index[0].tolist()[2:9] == batch.pair_index[1].tolist()[:7]
    assert batch.loss_mask.sum(1).tolist() == [10, 8]
    assert len(pack_rows(rows, share_prefixes=False).targets) == 18


@settings(max_examples=60, deadline=None)
@given(row_families())
def test_each_trained_token_has_its_context_and_its_values(family: list[TokenSequence]) -> None:
    for share_prefixes in (True, False):
        batch = pack_rows(family, share_prefixes=share_prefixes)
        visible = batch.layout.visible()
        for number, row in enumerate(family):
            trained = [place for place, flag in enumerate(row.loss_mask) if flag]
            count = len(trained)
            assert batch.loss_mask[number].tolist() == [True] * count + [False] * (
                batch.loss_mask.shape[1] - count
            )
            pairs = batch.pair_index[number, :count]
            assert batch.targets[pairs].tolist() == [row.token_ids[place] for place in trained]
            for place, predecessor in zip(trained, batch.predecessors[pairs], strict=True):
                context = visible[predecessor].nonzero()[:, 0]
                assert batch.input_ids[context].tolist() == row.token_ids[:place]
                assert batch.position_ids[context].tolist() == list(range(place))
            torch.testing.assert_close(
                batch.behaviour_log_probs[number, :count],
                torch.tensor([row.log_probs[place] for place in trained]),
            )
            assert batch.advantages[number, :count].tolist() == [row.advantage] * count
        assert not batch.advantages[~batch.loss_mask].any()
        assert not batch.behaviour_log_probs[~batch.loss_mask].any()


def test_rows_that_train_nothing_cost_nothing() -> None:
    idle = make_row([1, 2, 3], [0, 0, 0])
    batch = pack_rows([idle, *ROWS])
    assert batch.input_ids.tolist() == [5, 8]
    assert batch.loss_mask.tolist() == [[False], [True], [True]]
    alone = pack_rows([idle])
    assert alone.input_ids.tolist() == [1]
    assert not alone.loss_mask.any()
    assert len(alone.targets) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
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
    layout: Callable[[Sequence[TokenSequence]], object],
    rows: list[TokenSequence],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        layout(rows)
