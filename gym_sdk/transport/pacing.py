"""How much is handed over in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

__all__ = ["Pacer"]


class Pacer:
    """Hands over so many results in a turn of the event loop, and the rest in the next ones.

    Thousands of answers can arrive together. Each wakes a task that reads it, runs a tool and sends the next
    request; all of them in one turn would hold up everything else for as long as that takes. This bounds
    requests as well: each follows an answer.

    Args:
        per_turn: how much is handed over in a turn.
    """

    __slots__ = ("_left", "_scheduled", "_waiting", "per_turn")

    def __init__(self, per_turn: int = 32) -> None:
        self.per_turn = per_turn
        self._left = per_turn
        self._scheduled = False
        self._waiting: deque[tuple[asyncio.Future[Any], Any]] = deque()

    def hand(self, future: asyncio.Future[Any], result: Any) -> None:
        """Set the result of a future, now or in one of the next turns; in the order of coming.

        A future that is done by then is left alone.
        """
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left and not self._waiting:
            self._left -= 1
            future.set_result(result)
        else:
            self._waiting.append((future, result))

    def _turn(self) -> None:
        self._left = self.per_turn
        while self._left and self._waiting:
            future, result = self._waiting.popleft()
            if not future.done():
                future.set_result(result)
                self._left -= 1
        if self._waiting or self._left < self.per_turn:
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._scheduled = False
