"""Model calls over one or more replicas: retries, circuit breakers, affinity, and an end to every wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from gym_sdk.deadline import Deadline
from gym_sdk.errors import ConfigurationError, GymError, TransportError
from gym_sdk.schema import Response, ResponseRequest, TokenForm, Turn
from gym_sdk.transport.base import Transport
from gym_sdk.transport.breaker import Breaker, CircuitState
from gym_sdk.transport.faults import Fault, fault_of
from gym_sdk.transport.placement import Placement
from gym_sdk.transport.replica import Replica, ReplicaHealth
from gym_sdk.transport.retry import Retry, RetryBudget

__all__ = ["Answer", "Check", "Dispatch"]

Check: TypeAlias = Callable[[Turn], None]

R = TypeVar("R")

_log = logging.getLogger(__name__)


class Answer(NamedTuple, Generic[R]):
    """A response, or what a rollout reads of one, and what it took to get it."""

    response: R
    retries: int
    """Tries that failed before."""
    replica: str
    """The name of the replica that answered."""


class Dispatch:
    """Sends model calls to replicas, each until it is answered, refused, or not worth another try.

    The transports stay the caller's to open and close; close this before them. It belongs to the event loop
    in which it is first used.

    Args:
        replicas: transports that reach the same policy.
        retry: how a call is tried again.
        breaker: when a replica is left alone, and how long calls wait for one.

    Raises:
        ConfigurationError: there is no replica.
    """

    def __init__(
        self, replicas: Sequence[Transport], *, retry: Retry | None = None, breaker: Breaker | None = None
    ) -> None:
        if not replicas:
            raise ConfigurationError("a dispatch needs at least one replica")
        self.retry = retry or Retry()
        self.breaker = breaker or Breaker()
        self._replicas = [Replica(transport, n, self.breaker) for n, transport in enumerate(replicas)]
        self._placement = Placement(self._replicas)
        self._budget = RetryBudget(self.retry)
        self._usable = asyncio.Event()
        self._usable.set()
        self._probes: dict[Replica, asyncio.Task[None]] = {}
        self._closed = False

    async def respond(
        self,
        request: ResponseRequest,
        *,
        token_form: TokenForm = "item",
        affinity: str | None = None,
        request_id: str | None = None,
        try_s: float | None = None,
    ) -> Answer[Response]:
        """Send one request until it is answered. Cancelling this ends the generation.

        Args:
            request: what to send.
            token_form: where the tokens shall stand in the response.
            affinity: calls that share it share a prefix, and go to one replica as long as that is well.
            request_id: names the call over all its tries, so that a server that knows `Idempotency-Key`
                samples once. No other call may have it.
            try_s: deadline of each try. A try that runs out counts as a failure of the replica and is
                tried again; waiting for a place or for a replica that is out does not count.

        Raises:
            TransportError: the last failure, after all tries; or there were too many retries already; or all
                replicas have been out for longer than `Breaker.patience_s`.
            DeadlineError: the last try took longer than `try_s`.
            PolicyError: the policy refused the request.
            TokenContractError: the answer's tokens contradict each other.
            ConfigurationError: the transport is not open, or this is closed.
        """
        call: _Call[Response] = _Call(_RESPONSE, request, token_form, request_id)
        return await self._make(call, affinity, try_s, None)

    async def turn(
        self,
        request: ResponseRequest,
        *,
        token_form: TokenForm = "item",
        affinity: str | None = None,
        request_id: str | None = None,
        try_s: float | None = None,
        check: Check | None = None,
    ) -> Answer[Turn]:
        """Send one request of a rollout; as `respond`, but of the answer only what a rollout needs is read.

        Args:
            request: what to send.
            token_form: as for `respond`.
            affinity: as for `respond`.
            request_id: as for `respond`.
            try_s: as for `respond`.
            check: raises a `TransportError` for what is no answer to the request; it counts as a failed try.

        Raises:
            GymError: as for `respond`.
        """
        call: _Call[Turn] = _Call(_TURN, request, token_form, request_id)
        return await self._make(call, affinity, try_s, check)

    async def _make(
        self,
        call: _Call[R],
        affinity: str | None,
        try_s: float | None,
        check: Callable[[R], None] | None,
    ) -> Answer[R]:
        while True:
            replica = self._placement.choose(affinity)
            if replica is None:
                await self._wait_for_a_replica()
                continue
            gate, circuit = replica.gate, replica.circuit
            if not gate.try_enter() and not await gate.enter():
                continue
            replica.tries += 1
            began_in, began_as = circuit.round, circuit.state
            try:
                if try_s is None:
                    response = await call.sent_to(replica)
                else:
                    with Deadline(try_s, replica.try_name):
                        response = await call.sent_to(replica)
                if check is not None:
                    check(response)
                replica.has_answered = True
                self._budget.earn()
                if circuit.failed_in_row or began_as is not CircuitState.CLOSED:
                    self._note_well(replica, began_in)
                if gate.limit < gate.most:
                    gate.grow()
                return Answer(response, call.failures, replica.name)
            except GymError as error:
                failure = error
            finally:
                gate.leave()
            await self._recover(failure, call, replica, began_in, began_as)

    def health(self) -> list[ReplicaHealth]:
        """Return what is known of each replica, in the order in which they were given."""
        return [replica.health() for replica in self._replicas]

    async def aclose(self) -> None:
        """End the probes; calls that wait for a replica that is out fail."""
        self._closed = True
        self._usable.set()
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        for replica in self._replicas:
            replica.gate.close()
        if probes:
            await asyncio.wait(probes)

    async def _recover(
        self, failure: GymError, call: _Call[Any], replica: Replica, began_in: int, began_as: CircuitState
    ) -> None:
        """Return when a failed call may be tried again, or raise why it may not."""
        fault = fault_of(failure)
        replica.failures[fault] += 1
        now = asyncio.get_running_loop().time()
        call.failed(now)
        retry_after_s: float | None = getattr(failure, "retry_after_s", None)
        if fault not in (Fault.BROKEN, Fault.LOCAL):
            self._note_well(replica, began_in)
        if fault is Fault.FINAL or (self.retry.attempts == 1 and fault is not Fault.LOCAL):
            self._note_broken(replica, fault, failure, began_in)
            raise failure
        is_late = now - call.troubled_since >= self._patience_s
        if fault in (Fault.BUSY, Fault.LOCAL) and not is_late:
            replica.gate.shrink()
            replica.gate.pause(self.retry.pause_s(call.failures, retry_after_s))
            return
        self._note_broken(replica, fault, failure, began_in)
        went_out = began_as is CircuitState.CLOSED and began_in != replica.circuit.round
        if went_out and not is_late:
            return  # it was not this call's doing, and others wait just so
        call.tries_used += 1
        if is_late and fault is Fault.BUSY:
            raise TransportError(
                f"{failure}; so it was for {now - call.troubled_since:.3g} s, and calls wait "
                f"{self._patience_s:g} s (Breaker.patience_s). Ask for fewer at once (Limits.model_calls)",
                retryable=True,
                status=getattr(failure, "status", None),
                retry_after_s=retry_after_s,
            ) from failure
        if call.tries_used >= self.retry.attempts or is_late:
            raise failure
        if not self._budget.take():
            raise TransportError(
                f"{failure}; it was not tried again, because too many calls failed lately: the budget for "
                "retries is used up (Retry.budget, Retry.reserve)",
                retryable=True,
                status=getattr(failure, "status", None),
                retry_after_s=retry_after_s,
            ) from failure
        await asyncio.sleep(self.retry.pause_s(call.tries_used, retry_after_s))

    @property
    def _patience_s(self) -> float:
        if any(replica.has_answered for replica in self._replicas):
            return self.breaker.patience_s
        return min(self.breaker.patience_s, self.breaker.first_patience_s)

    def _note_well(self, replica: Replica, began_in: int) -> None:
        replica.has_answered = True
        if replica.circuit.succeeded(began_in):
            _log.info("%s answers again", replica.name)

    def _note_broken(self, replica: Replica, fault: Fault, failure: GymError, began_in: int) -> None:
        """Count a failure of the replica's own; enough of them send its calls elsewhere."""
        if fault is not Fault.BROKEN:
            return
        circuit = replica.circuit
        outages = circuit.opened
        now, in_flight = asyncio.get_running_loop().time(), replica.gate.in_flight
        if not circuit.failed(began_in, str(failure), now, in_flight=in_flight):
            return
        if circuit.opened > outages:
            _log.warning(
                "%s is out after %d failures in a row and is probed until it answers; the last one: %s",
                replica.name,
                circuit.failed_in_row,
                failure,
            )
        if all(other.circuit.state is CircuitState.OPEN for other in self._replicas):
            self._usable.clear()
        if not self._closed:
            self._probes[replica] = asyncio.create_task(self._probe(replica))
        replica.gate.turn_away()

    async def _probe(self, replica: Replica) -> None:
        """Ask a replica that is out whether it is there, again and again, until it is."""
        circuit = replica.circuit
        try:
            while circuit.state is CircuitState.OPEN:
                await asyncio.sleep(circuit.next_pause_s())
                try:
                    async with asyncio.timeout(self.breaker.probe_deadline_s):
                        await replica.probe()
                except Exception as error:  # whatever it is, the replica is not known to be well
                    _log.debug("%s is still out: %r", replica.name, error)
                else:
                    circuit.probe_succeeded()
                    replica.has_answered = True
                    self._usable.set()
        finally:
            del self._probes[replica]

    async def _wait_for_a_replica(self) -> None:
        """Return once a replica may be there.

        Raises:
            TransportError: they have all been out for too long.
            ConfigurationError: nobody probes them any more.
        """
        if self._closed:
            raise ConfigurationError("the client was closed while its server was out")
        since = max(replica.circuit.down_since or 0.0 for replica in self._replicas)
        until = since + self._patience_s
        loop = asyncio.get_running_loop()
        if loop.time() < until:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._usable.wait()
                return
        last = "; ".join(replica.circuit.last_failure for replica in self._replicas)
        raise TransportError(
            f"no replica has answered for {loop.time() - since:.3g} s, and calls wait {self._patience_s:g} s "
            f"(Breaker.patience_s); the last failure of each: {last}",
            retryable=True,
        )


_RESPONSE = attrgetter("respond")
_TURN = attrgetter("turn")


class _Call(Generic[R]):
    """One call, over all its tries.

    Args:
        way: chooses how a replica is asked.
        request: what to send.
        token_form: where the tokens shall stand in the response.
        request_id: names it over all tries.
    """

    __slots__ = ("_form", "_id", "_request", "_way", "failures", "tries_used", "troubled_since")

    def __init__(
        self,
        way: Callable[[Replica], Callable[..., Awaitable[R]]],
        request: ResponseRequest,
        token_form: TokenForm,
        request_id: str | None,
    ) -> None:
        self._way = way
        self.failures = 0
        self.tries_used = 0  # failures, less those that were nobody's fault
        self.troubled_since = 0.0
        self._request = request
        self._form: TokenForm = token_form
        self._id = request_id

    def sent_to(self, replica: Replica) -> Awaitable[R]:
        """Begin a try."""
        if self.failures:
            replica.retries += 1
        send = self._way(replica)
        if self._id is None or not replica.takes_ids:
            return send(self._request, token_form=self._form)
        return send(self._request, token_form=self._form, request_id=self._id, attempt=self.failures + 1)

    def failed(self, now: float) -> None:
        """Count a failed try."""
        if not self.failures:
            self.troubled_since = now
        self.failures += 1
