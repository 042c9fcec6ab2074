"""One of the servers that calls are spread over: its circuit, its gate, and what is counted of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gym_sdk.errors import PolicyError, TransportError
from gym_sdk.schema import Response, ResponseRequest, Turn
from gym_sdk.transport.base import Transport
from gym_sdk.transport.breaker import Breaker, Circuit, CircuitState
from gym_sdk.transport.faults import Fault
from gym_sdk.transport.gate import Gate

__all__ = ["Replica", "ReplicaHealth", "name_of"]


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """What is known of a replica at the moment, for metrics and logs."""

    name: str
    """Its address, or its place among the replicas."""
    state: CircuitState
    """Whether it gets calls."""
    in_flight: int
    """Calls that it is answering."""
    waiting: int
    """Calls that wait for its gate."""
    limit: float
    """Calls at once that it gets; less than the most after it said that it was too much."""
    tries: int
    """Tries so far; the first ones of calls included."""
    retries: int
    """Tries that followed a failed one of the same call, here or elsewhere."""
    failures: dict[str, int]
    """Failed tries by `Fault`."""
    opened: int
    """Outages so far."""
    last_failure: str
    """The newest failure's message; empty if there was none."""


def name_of(transport: Transport, index: int) -> str:
    """Return what a transport is called in messages: its address, or its place."""
    return getattr(transport, "base_url", None) or f"replica {index}"


class Replica:
    """A transport, and how it is doing.

    Args:
        transport: reaches it.
        index: its place among the replicas.
        breaker: when its circuit opens.
    """

    __slots__ = (
        "circuit",
        "failures",
        "gate",
        "has_answered",
        "index",
        "name",
        "respond",
        "retries",
        "takes_ids",
        "transport",
        "tries",
        "try_name",
        "turn",
    )

    def __init__(self, transport: Transport, index: int, breaker: Breaker) -> None:
        self.transport = transport
        self.index = index
        self.name = name_of(transport, index)
        self.try_name = f"a model call to {self.name} (Deadlines.model_call_s)"
        self.circuit = Circuit(breaker)
        self.gate = Gate(getattr(transport, "max_connections", None))
        self.takes_ids: bool = getattr(transport, "takes_request_ids", False)
        self.respond: Callable[..., Awaitable[Response]] = transport.respond
        self.turn: Callable[..., Awaitable[Turn]] = getattr(transport, "turn", None) or self._turn
        self.has_answered = False
        self.tries = 0
        self.retries = 0
        self.failures: dict[Fault, int] = dict.fromkeys(Fault, 0)

    async def _turn(self, request: ResponseRequest, **options: Any) -> Turn:
        return Turn.of(await self.respond(request, **options))

    async def probe(self) -> None:
        """Ask it whether it is there. Without a way to ask, the next calls are what finds out.

        Raises:
            TransportError: it is not.
        """
        probe: Any = getattr(self.transport, "probe", None)
        if probe is None:
            return
        try:
            await probe()
        except PolicyError:
            return  # whoever refuses is there
        except TransportError as error:
            if error.status is None or error.status >= 500:
                raise

    def health(self) -> ReplicaHealth:
        """Return what is known of it."""
        circuit, gate = self.circuit, self.gate
        return ReplicaHealth(
            name=self.name,
            state=circuit.state,
            in_flight=gate.in_flight,
            waiting=gate.waiting,
            limit=gate.limit,
            tries=self.tries,
            retries=self.retries,
            failures={fault.value: count for fault, count in self.failures.items()},
            opened=circuit.opened,
            last_failure=circuit.last_failure,
        )
