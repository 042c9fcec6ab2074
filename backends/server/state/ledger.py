"""What linked things take up together, each counted once for as long as something holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["ChainLedger"]

T = TypeVar("T")


class ChainLedger(Generic[T]):
    """Counts things that are linked to others of their kind, and hold them.

    Things are told apart by identity. They must stay alive for as long as they are held.

    Args:
        parent: what a thing is linked to.
        cost: what it takes up itself; must not change.
    """

    def __init__(self, parent: Callable[[T], T | None], cost: Callable[[T], int]) -> None:
        self.total = 0
        self._parent = parent
        self._cost = cost
        self._holders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def hold(self, thing: T) -> list[T]:
        """Hold a thing and those that it is linked to; return what was not held before."""
        new: list[T] = []
        held: T | None = thing
        while held is not None:
            count = self._holders.get(id(held), 0)
            self._holders[id(held)] = count + 1
            if count:
                break
            self.total += self._cost(held)
            new.append(held)
            held = self._parent(held)
        return new

    def release(self, thing: T) -> list[T]:
        """Undo one `hold`; return what is not held any more."""
        gone: list[T] = []
        held: T | None = thing
        while held is not None:
            self._holders[id(held)] -= 1
            if self._holders[id(held)]:
                break
            del self._holders[id(held)]
            self.total -= self._cost(held)
            gone.append(held)
            held = self._parent(held)
        return gone
