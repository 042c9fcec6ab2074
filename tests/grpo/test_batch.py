"""Training rows to padded tensors."""

from __future__ import annotations

import pytest
import torch

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo import to_tensors
from gym_sdk.tokens import TokenSequence


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
