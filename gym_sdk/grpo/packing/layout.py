"""Which tokens of a packed stream see which: all that attention has to know of a forest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gym_sdk.grpo.packing.forest import Forest

__all__ = ["ForestLayout", "Span", "make_layout"]


class Span(NamedTuple):
    """Where a segment lies in the stream, as half-open ranges."""

    start: int
    """The segment's first token."""
    stop: int
    """The end of the segment; its descendants begin here."""
    reach: int
    """The end of its last descendant; equal to `stop` if it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class ForestLayout:
    """A forest's segments in a packed stream, in depth-first order.

    A token sees itself, the tokens before it in its segment, and its ancestors' segments. As descendants
    follow a segment without a gap, that is one rule: query q sees key k if `k <= q < last_reader[k]`.
    """

    spans: tuple[Span, ...]
    """Where the segments lie."""
    last_reader: Int[Tensor, " tokens"]
    """The end of the range of tokens that see this one."""
    longest: int
    """Tokens of the longest path."""

    def reads(self) -> Iterator[tuple[slice, slice, bool]]:
        """Yield (queries, keys, is_own) such that each query meets each key that it sees exactly once.

        Own parts are causal, and cover every token; they come first. Descendants see all of a segment.
        """
        for start, stop, _ in self.spans:
            yield slice(start, stop), slice(start, stop), True
        for start, stop, reach in self.spans:
            if stop < reach:
                yield slice(stop, reach), slice(start, stop), False

    def visible(self) -> Bool[Tensor, "queries keys"]:
        """Return the rule as a dense mask; for checks, as its size is the square of the stream's."""
        place = torch.arange(len(self.last_reader), device=self.last_reader.device)
        return (place <= place[:, None]) & (place[:, None] < self.last_reader)


def make_layout(forest: Forest, device: torch.device | str = "cpu") -> ForestLayout:
    """Lay a forest's segments one after another.

    Args:
        forest: at least one segment.
        device: where the tensor goes.
    """
    starts, place = [], 0
    for segment in forest.segments:
        starts.append(place)
        place += len(segment)
    reach = [start + len(segment) for start, segment in zip(starts, forest.segments, strict=True)]
    for number in reversed(range(len(reach))):
        parent = forest.segments[number].parent
        if parent is not None:
            reach[parent] = max(reach[parent], reach[number])
    sizes = torch.tensor([len(segment) for segment in forest.segments])
    return ForestLayout(
        spans=tuple(
            Span(start, start + len(segment), end)
            for start, segment, end in zip(starts, forest.segments, reach, strict=True)
        ),
        last_reader=torch.tensor(reach).repeat_interleave(sizes).to(device),
        longest=max(segment.stop for segment in forest.segments),
    )
