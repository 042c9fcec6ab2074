"""Places for what may run at once, given to the oldest work first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from types import TracebackType

__all__ = ["Claim", "Slots"]


class Slots:
    """A limit on how much runs at once. Who waits is served by order, not by time of arrival.

    A rollout's order is when it was admitted, so that old groups finish before new ones go on.

    Args:
        limit: how many places there are.
    """

    __slots__ = ("_free", "_numbers", "_waiting", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free = limit
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @property
    def used(self) -> int:
        """How many places are taken."""
        return self.limit - self._free

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return sum(not future.done() for _, _, future in self._waiting)

    def claim(self, order: int) -> Claim:
        """Return what takes a place for work of this order: `async with claim`, again and again."""
        return Claim(self, order)

    async def acquire(self, order: int) -> None:
        """Wait for a place; smaller orders go first."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._numbers), future))
        self._serve()  # a place may be free while those who waited for it were cancelled
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a place back."""
        self._free += 1
        self._serve()

    def _serve(self) -> None:
        while self._free and self._waiting:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                self._free -= 1
                future.set_result(None)


class Claim:
    """Places in `Slots` for work of one order: entering takes one, leaving frees it, as often as needed."""

    __slots__ = ("_order", "_slots")

    def __init__(self, slots: Slots, order: int) -> None:
        self._slots = slots
        self._order = order

    async def __aenter__(self) -> None:
        await self._slots.acquire(self._order)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._slots.release()
