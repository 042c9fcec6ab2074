"""Which rows make an update, and how they are cut to fit into memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.packing import PackedBatch, TokenBatch, pack_rows, plan_micro_batches, to_tensors
from gym_sdk.tokens import TokenSequence, pack_by_budget

__all__ = ["micro_batches", "minibatches"]


def minibatches(
    groups: Sequence[Sequence[TokenSequence]], config: GRPOConfig, step: int
) -> Iterator[list[int]]:
    """Yield the row indices of each update: whole groups, shuffled anew in each epoch."""
    members: list[range] = []
    for group in groups:
        first = members[-1].stop if members else 0
        members.append(range(first, first + len(group)))
    for epoch in range(config.epochs):
        order = list(members)
        random.Random(f"{config.seed}:{step}:{epoch}").shuffle(order)
        count = min(config.minibatches, len(order))
        for part in range(count):
            chosen = order[part * len(order) // count : (part + 1) * len(order) // count]
            yield [index for group_rows in chosen for index in group_rows]


def micro_batches(
    rows: Sequence[TokenSequence], indices: Sequence[int], config: GRPOConfig, device: torch.device
) -> Iterator[tuple[list[int], PackedBatch | TokenBatch]]:
    """Yield the rows of one update in parts of `config.max_tokens_per_microbatch`, with their indices."""
    chosen = [rows[index] for index in indices]
    budget = config.max_tokens_per_microbatch
    if config.pack:
        plan = plan_micro_batches(chosen, budget)
    else:
        plan = pack_by_budget([len(row) for row in chosen], budget)
    for places in plan:
        part = [chosen[place] for place in places]
        batch = pack_rows(part, device) if config.pack else to_tensors(part, device)
        yield [indices[place] for place in places], batch
