"""Rows into micro-batches by the tokens that they cost once packed."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.packing.forest import MIN_SHARED, build_forest, sort_by_prefix
from gym_sdk.grpo.packing.packed import context_tokens
from gym_sdk.tokens import TokenSequence

__all__ = ["plan_micro_batches"]


def plan_micro_batches(
    rows: Sequence[TokenSequence], max_tokens: int, *, share_prefixes: bool = True
) -> list[list[int]]:
    """Divide rows into micro-batches of at most `max_tokens` packed tokens each, near-equal in size.

    Rows with a common prefix stay together, so that it is computed once; only what is over the budget as a
    whole is divided. The plan depends on nothing but the arguments.

    Args:
        rows: what one update trains on.
        max_tokens: budget of the stream that `pack_rows` makes of one micro-batch. A single row over the
            budget gets a micro-batch of its own.
        share_prefixes: as it will be given to `pack_rows`.

    Returns:
        Indices into `rows`, each exactly once, ascending in each micro-batch; the largest micro-batch is
        first, so that the peak of memory comes at once.

    Raises:
        ConfigurationError: `max_tokens` is not positive.
    """
    if max_tokens <= 0:
        raise ConfigurationError(f"max_tokens must be positive, not {max_tokens}")
    contexts = [row.token_ids[: context_tokens(row)] for row in rows]

    def cost(members: Sequence[int]) -> int:
        return build_forest([contexts[index] for index in members], share_prefixes=share_prefixes).tokens

    trees = _trees(contexts) if share_prefixes else [[index] for index in range(len(rows))]
    units = [unit for tree in trees for unit in _divide(tree, max_tokens, cost)]
    oversize = [unit for unit in units if unit[0] > max_tokens]
    fitting = [unit for unit in units if unit[0] <= max_tokens]
    count = -(-sum(tokens for tokens, _ in fitting) // max_tokens) or int(bool(fitting))
    batches = _balance(fitting, count)
    while any(cost(members) > max_tokens for _, members in batches):
        count += 1
        batches = _balance(fitting, count)
    batches = sorted(oversize + batches, key=lambda batch: (-batch[0], min(batch[1])))
    return [sorted(members) for _, members in batches]


Unit = tuple[int, list[int]]
"""Packed tokens, and the rows that make them."""


def _trees(contexts: Sequence[list[int]]) -> list[list[int]]:
    """Gather rows that share tokens, each tree in the order of their prefixes."""
    trees: list[list[int]] = []
    for index, shared in zip(*sort_by_prefix(contexts), strict=True):
        if shared >= MIN_SHARED:
            trees[-1].append(index)
        else:
            trees.append([index])
    return trees


def _divide(tree: list[int], max_tokens: int, cost: Callable[[Sequence[int]], int]) -> list[Unit]:
    """Cut a tree's rows into runs within the budget, each as long as possible."""
    units: list[Unit] = []
    while (tokens := cost(tree)) > max_tokens and len(tree) > 1:
        sizes = range(1, len(tree))
        size = bisect_right(sizes, max_tokens, key=lambda size: cost(tree[:size])) or 1
        units.append((cost(tree[:size]), tree[:size]))
        tree = tree[size:]
    return [*units, (tokens, tree)]


def _balance(units: Sequence[Unit], count: int) -> list[Unit]:
    """Put each unit, largest first, where there is least so far (longest processing time first)."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for cost, members in sorted(units, key=lambda unit: (-unit[0], unit[1])):
        load, number, so_far = heapq.heappop(heap)
        heapq.heappush(heap, (load + cost, number, so_far + members))
    return [(load, members) for load, _, members in heap if members]
