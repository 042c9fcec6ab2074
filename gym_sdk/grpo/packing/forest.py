"""Token lists with common beginnings as a forest whose segments hold each common token once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = ["MIN_SHARED", "Forest", "Segment", "build_forest", "sort_by_prefix"]

MIN_SHARED = 8
"""Fewest tokens of a shared segment. Each costs an attention call of its own in every layer, about the time
that a few tokens take in a small model, so shorter ones are computed once per row instead."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that every row through it has in common: `rows[row][start:stop]`."""

    row: int
    """A row that contains the segment."""
    start: int
    """The segment's first position in that row; the ancestors' tokens precede it."""
    stop: int
    """The position after the segment's last."""
    parent: int | None
    """Number of the segment that this one continues; None for a root."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Forest:
    """Rows as paths through segments. A row's tokens are those of its path's segments, one after another."""

    segments: tuple[Segment, ...]
    """In depth-first order: what continues a segment, directly or not, follows it without a gap."""
    paths: tuple[tuple[int, ...], ...]
    """The segment numbers of each row, from the root down; empty for a row without tokens."""

    @property
    def tokens(self) -> int:
        """How many tokens there are to compute."""
        return sum(len(segment) for segment in self.segments)


def build_forest(rows: Sequence[Sequence[int]], *, share_prefixes: bool = True) -> Forest:
    """Arrange rows so that beginnings they have in common exist once.

    Rows part where their token ids first differ, or where one ends. A shared segment has at least
    `MIN_SHARED` tokens: rows that have fewer in common beyond the last split keep their own copies.

    Args:
        rows: token ids.
        share_prefixes: False: each row is a segment of its own, in the order given.
    """
    order, shared = sort_by_prefix(rows) if share_prefixes else (list(range(len(rows))), [0] * len(rows))
    segments: list[Segment] = []
    paths: list[tuple[int, ...]] = [()] * len(rows)
    # Work left: rows order[low:high], which have their first `depth` tokens in `path`. Last in, first out, so
    # that a subtree is finished before its sibling begins.
    work: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(rows), 0, ())]
    while work:
        low, high, depth, path = work.pop()
        row = order[low]
        is_leaf = high - low == 1
        stop = len(rows[row]) if is_leaf else min(shared[low + 1 : high])
        if stop - depth >= (1 if is_leaf else MIN_SHARED):
            segments.append(Segment(row, depth, stop, path[-1] if path else None))
            path, depth = (*path, len(segments) - 1), stop
        if is_leaf:
            paths[row] = path
            continue
        cuts = [low, *(place for place in range(low + 1, high) if shared[place] == stop), high]
        work += [(start, end, depth, path) for start, end in reversed(list(pairwise(cuts)))]
    return Forest(tuple(segments), tuple(paths))


def sort_by_prefix(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Sort rows by their token ids, so that rows with a common beginning are neighbours.

    Returns:
        Indices into `rows`, and for each of them how many first tokens that row has in common with the one
        before it in this order (0 for the first).
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    tensors = [torch.tensor(rows[index], dtype=torch.long) for index in order]
    shared = [0] * len(rows)
    for place, (before, row) in enumerate(pairwise(tensors), start=1):
        size = min(len(before), len(row))
        differing = (before[:size] != row[:size]).nonzero()
        shared[place] = int(differing[0]) if len(differing) else size
    return order, shared
