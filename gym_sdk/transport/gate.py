"""A gate before a replica: how many calls are let through at once, in the order in which they came."""

from __future__ import annotations

import asyncio
import math
from collections import deque

__all__ = ["Gate"]

_GROWTH = 1 / 4
"""How much the limit grows with a call that succeeds at the limit: by this share in a full round of calls."""

_STEADY_S = 30.0
"""How long the limit stays after it shrank. Growing ends with another refusal, and a pause."""


class Gate:
    """Lets calls through up to a limit, which shrinks when the replica says that it is too much.

    A call that waits here has not begun: its deadline does not run, and it has no connection.

    Args:
        most: calls at once; None is without limit.
    """

    __slots__ = (
        "_closed_until",
        "_steady_until",
        "_timer",
        "_turns",
        "in_flight",
        "limit",
        "most",
        "waiting",
    )

    def __init__(self, most: int | None = None) -> None:
        self.most: float = math.inf if most is None else most
        self.limit = self.most
        self.in_flight = 0
        self.waiting = 0
        self._turns: deque[asyncio.Future[bool]] = deque()  # those that were cancelled stay until their turn
        self._timer: asyncio.TimerHandle | None = None
        self._closed_until = 0.0
        self._steady_until = 0.0

    @property
    def load(self) -> int:
        """How many calls are here, those that wait included."""
        return self.in_flight + self.waiting

    @property
    def is_paused(self) -> bool:
        """Whether nobody is let through for a while."""
        return self._timer is not None

    def try_enter(self) -> bool:
        """Go through if that takes no waiting; whoever went through has to `leave`."""
        if self.in_flight >= self.limit or self._timer is not None or self.waiting:
            return False
        self.in_flight += 1
        return True

    async def enter(self) -> bool:
        """Go through when it is one's turn; False, without having gone through, after `turn_away`."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        self.waiting += 1
        try:
            self._admit()
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():  # it was let through at the same moment
                self.leave()
            raise
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        """Make room for the next."""
        self.in_flight -= 1
        if self._turns:
            self._admit()

    def turn_away(self) -> None:
        """Send away all that wait."""
        turns, self._turns = self._turns, deque()
        for turn in turns:
            if not turn.done():
                turn.set_result(False)

    def shrink(self) -> None:
        """Let through no more at once than are through now; whoever was refused has left already."""
        self.limit = max(1.0, min(self.limit, float(self.in_flight)))
        self._steady_until = asyncio.get_running_loop().time() + _STEADY_S

    def grow(self) -> None:
        """Let through a little more at once: a call has succeeded at the limit, and is still here."""
        if (
            self.limit < self.most
            and self.in_flight + 1 > self.limit
            and asyncio.get_running_loop().time() >= self._steady_until
        ):
            self.limit = min(self.most, self.limit + _GROWTH)

    def pause(self, seconds: float) -> None:
        """Let nobody through for so long; a longer pause that began before stays."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        if until <= self._closed_until:
            return
        self.close()
        self._closed_until = until
        self._timer = loop.call_at(until, self._resume)

    def close(self) -> None:
        """Drop the timer of a pause."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _resume(self) -> None:
        self._timer = None
        self._admit()

    def _admit(self) -> None:
        while self._turns and self._timer is None and self.in_flight < self.limit:
            turn = self._turns.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(True)
