"""Which replica a call goes to: the one that has the prefix of its group, or the one with the least to do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from gym_sdk.transport.breaker import CircuitState
from gym_sdk.transport.replica import Replica

__all__ = ["Placement"]

_PLACES = 65_536
"""Groups whose replica is remembered; the least recently used go first."""

_CROWDED = 2.0
_SLACK = 16
"""A group moves when its replica has more than `_CROWDED` times the least load of all and `_SLACK` calls."""


class Placement:
    """Remembers where groups are. A move is safe: the new replica is told the whole history once.

    Args:
        replicas: where calls can go.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._places: OrderedDict[str, Replica] = OrderedDict()
        self._next = 0

    def choose(self, affinity: str | None) -> Replica | None:
        """Return where to send a call; None if every replica is out.

        Args:
            affinity: what shares a prefix, such as a group's id; None if it is all the same.
        """
        if len(self._replicas) == 1:
            only = self._replicas[0]
            return None if only.circuit.state is CircuitState.OPEN else only
        if affinity is None:
            return self._idlest()
        places = self._places
        here = places.get(affinity)
        if here is not None:
            places.move_to_end(affinity)
            if here.circuit.state is not CircuitState.OPEN and not self._is_crowded(here):
                return here
        place = self._idlest()
        if place is not None:
            places[affinity] = place
            if len(places) > _PLACES:
                places.popitem(last=False)
        return place

    def _idlest(self) -> Replica | None:
        """Return the one with the least load; of those with the same, each in turn."""
        replicas = self._replicas
        best: Replica | None = None
        least: tuple[bool, int] | None = None
        start = self._next
        for step in range(len(replicas)):
            replica = replicas[(start + step) % len(replicas)]
            if replica.circuit.state is CircuitState.OPEN:
                continue
            load = (replica.gate.is_paused, replica.gate.load)
            if least is None or load < least:
                best, least = replica, load
        if best is not None:
            self._next = (best.index + 1) % len(replicas)
        return best

    def _is_crowded(self, here: Replica) -> bool:
        load = here.gate.load
        if load <= _SLACK:
            return False
        usable = (other.gate for other in self._replicas if other.circuit.state is not CircuitState.OPEN)
        return load > _CROWDED * min(gate.load for gate in usable) + _SLACK
