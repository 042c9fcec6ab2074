"""A response in the making: what is certain of it already."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from backends.ids import is_own_id
from gym_sdk.schema import FunctionCall, Item, Response

__all__ = ["Pacer", "Snapshot", "StableIds"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is certain of a response.

    Attributes:
        response: `in_progress` until the last snapshot, which has the whole response.
        items: the output so far. The next snapshot's begins with these, apart from the last one if `open`.
        open: whether the last item may still grow: its text is then the beginning of what it will be.
        done: whether this is the last snapshot.
    """

    response: Response
    items: Sequence[Item] = ()
    open: bool = False
    done: bool = False


class StableIds:
    """Gives the items of successive readings of one generation the ids that they had at first."""

    def __init__(self) -> None:
        self._first: list[Item] = []

    def apply(self, items: Sequence[Item]) -> list[Item]:
        """Return the items with the ids of those that stood in their places."""
        named = [
            _named_as(self._first[index], item) if index < len(self._first) else item
            for index, item in enumerate(items)
        ]
        self._first += named[len(self._first) :]
        return named


def _named_as(first: Item, item: Item) -> Item:
    ids = {"id": getattr(first, "id", None)}
    if isinstance(item, FunctionCall) and isinstance(first, FunctionCall) and is_own_id(item.call_id):
        ids["call_id"] = first.call_id
    return item.model_copy(update=ids)


class Pacer:
    """Shares out the event loop's time among streams.

    Every look at a generation reads it from its beginning. A stream looks again after a time that grows with
    what a look costs and with how many streams there are, so that all looks together take up a bounded share
    of one CPU, however long the generations and however many the streams.

    Args:
        share: of the event loop's time, in (0, 1).
    """

    _OVERHEAD_S = 1e-4

    def __init__(self, share: float = 0.25) -> None:
        self._share = share
        self.streams = 0

    @contextmanager
    def stream(self) -> Iterator[Pace]:
        """Count a stream for as long as the context lasts."""
        self.streams += 1
        try:
            yield Pace(self)
        finally:
            self.streams -= 1

    def pause_s(self, cost_s: float) -> float:
        """Return how long to wait after a look that took so long."""
        return (cost_s + self._OVERHEAD_S) * self.streams / self._share


class Pace:
    """When one stream may look at its generation again."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it may look now."""
        return time.perf_counter() >= self._next

    @contextmanager
    def look(self) -> Iterator[None]:
        """Take the time of a look."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._next = end + self._pacer.pause_s(end - start)
