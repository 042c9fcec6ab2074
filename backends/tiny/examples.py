"""Training rows: token ids and which of them carry loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from backends.tiny.families import Messages
from backends.tiny.vocabulary import IM_END, IM_START

__all__ = ["Batch", "Example", "ExampleEncoder", "make_batches"]

_BUCKETED_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: `token_ids`, and `loss_mask` of the same length."""

    token_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right. Padding carries no loss, and no earlier position sees it."""

    token_ids: torch.Tensor
    loss_mask: torch.Tensor


class ExampleEncoder:
    """Turns text and traces into rows.

    Args:
        tokenizer: the one that rollouts use.
        tool: the tool of the traces; None if they use none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tool: dict[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._tools: list[Any] | None = [tool] if tool is not None else None
        self._turn_start = tokenizer.encode(f"{IM_START}assistant\n")
        (self._turn_end,) = tokenizer.encode(IM_END)

    def trace(self, messages: Messages) -> Example:
        """Render a trace as a rollout renders it; what the assistant generates carries loss."""
        text = self._tokenizer.apply_chat_template(messages, tools=self._tools, tokenize=False)
        token_ids = self._tokenizer.encode(text)
        return Example(token_ids, self._assistant_mask(token_ids))

    def drill(self, lines: Sequence[str]) -> Example:
        """Write the lines of an exercise; all but the first carry loss."""
        encoded = [self._tokenizer.encode(f"{line}\n") for line in lines]
        token_ids = [token_id for line in encoded for token_id in line]
        given = len(encoded[0])
        return Example(token_ids, [False] * given + [True] * (len(token_ids) - given))

    def _assistant_mask(self, token_ids: Sequence[int]) -> list[bool]:
        """Mark what follows an assistant's turn start, up to and including the turn's end."""
        mask: list[bool] = []
        generated = False
        start = self._turn_start
        for index, token_id in enumerate(token_ids):
            mask.append(generated)
            if token_id == self._turn_end:
                generated = False
            elif list(token_ids[index + 1 - len(start) : index + 1]) == start:
                generated = True
        return mask


def make_batches(
    rng: Random, draw: Callable[[], Example], batch_size: int, steps: int, pad_token_id: int
) -> Iterator[Batch]:
    """Yield `steps` batches of rows of similar length, which wastes little on padding."""
    while steps > 0:
        count = min(_BUCKETED_BATCHES, steps)
        rows = sorted((draw() for _ in range(count * batch_size)), key=lambda row: len(row.token_ids))
        order = list(range(count))
        rng.shuffle(order)
        for index in order:
            yield _pad(rows[index * batch_size : (index + 1) * batch_size], pad_token_id)
        steps -= count


def _pad(rows: Sequence[Example], pad_token_id: int) -> Batch:
    width = max(len(row.token_ids) for row in rows)
    token_ids = torch.full((len(rows), width), pad_token_id)
    loss_mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        loss_mask[index, : len(row.loss_mask)] = torch.tensor(row.loss_mask)
    return Batch(token_ids, loss_mask)
