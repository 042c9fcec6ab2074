"""A limit that grows at the start, so that a server is not met by everything at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Ramp"]

_STEP_S = 0.05


class Ramp:
    """A limit that grows from 1 to its full size.

    Args:
        limit: its full size.
        ramp_s: how long that takes from `start` on, in seconds; 0: it is there at once.
        grown: called again and again while it grows.
    """

    def __init__(self, limit: int, ramp_s: float, grown: Callable[[], None]) -> None:
        self._limit = limit
        self._ramp_s = ramp_s
        self._grown = grown
        self._loop: asyncio.AbstractEventLoop
        self._started = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to grow."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        if self._ramp_s:
            self._timer = self._loop.call_later(_STEP_S, self._grow)

    def stop(self) -> None:
        """Call nobody any more."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def now(self) -> int:
        """The limit at this moment."""
        if not self._ramp_s:
            return self._limit
        share = (self._loop.time() - self._started) / self._ramp_s
        if share >= 1:
            self._ramp_s = 0.0
        return min(self._limit, max(1, int(self._limit * share)))

    def _grow(self) -> None:
        self._grown()
        if self._ramp_s:
            self._timer = self._loop.call_later(_STEP_S, self._grow)
