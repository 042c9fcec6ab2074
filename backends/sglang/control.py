"""Pausing SGLang, and holding it while its weights are replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from backends.engine import PauseMode
from backends.sglang.answer import Answer
from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.flight import Flight, Flights
from backends.sglang.weights.adapters import Adapters
from backends.sglang.weights.carriers import Carrier, FolderCarrier
from gym_sdk.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineError,
    GymError,
    PolicyError,
    TransportError,
)

__all__ = ["Control"]

logger = logging.getLogger(__name__)


class Control:
    """Whether one SGLang samples, and with which weights.

    Attributes:
        base: SGLang's label of the full weights.
        epoch: how often they were replaced.
        unfit: why the weights may not be sampled from; None if they may.
    """

    def __init__(self, client: SGLangClient, facts: Facts, flights: Flights, adapters: Adapters) -> None:
        self.base = facts.weight_version
        self.epoch = 0
        self.unfit: str | None = None
        self._client = client
        self._facts = facts
        # where the present weights can be read again; after another engine's update that is not known
        self._folder = Path(facts.model_path) if facts.unchanged else None
        self._flights = flights
        self._adapters = adapters
        self._paused = False
        self._updating = False
        self._lock = asyncio.Lock()

    @property
    def version(self) -> str:
        """The label of what samples new requests."""
        adapter = self._adapters.current
        return self.base if adapter is None else adapter.version

    @property
    def closed(self) -> bool:
        """Whether new requests wait."""
        return self._paused or self._updating

    def check_fit(self) -> None:
        """See that the weights may be sampled from.

        Raises:
            TransportError: they may not; an update may come.
        """
        if self.unfit is not None:
            raise TransportError(self.unfit, retryable=True)

    def noticed(self, flight: Flight, answer: Answer) -> None:
        """Take over the label of an answer: somebody else may have replaced the weights."""
        if flight.epoch == self.epoch and flight.adapter is None and answer.version != self.base:
            self.base, self._folder = answer.version, None

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling; see `Engine.pause`."""
        if mode not in ("abort", "retract", "in_place"):
            raise ConfigurationError(f"pause mode must be abort, retract or in_place, not {mode!r}")
        # SGLang's own `abort` ends other clients' requests, too, takes a second, and waits for ever if the
        # scheduler is paused already
        running = [flight for flight in self._flights if not flight.gated] if mode == "abort" else []
        sampling, self._paused = not self.closed, True
        try:
            if sampling:  # a request that is aborted while it waits loses tokens that were not sent yet
                await self._end(running)
            await self._pause("in_place" if mode == "in_place" else "retract")
            await self._end(running)
        except BaseException:
            self._paused = False
            if not self._updating:
                self._open()
            raise

    async def _end(self, flights: list[Flight]) -> None:
        for flight in set(flights).intersection(self._flights):
            self._flights.abort(flight.request.request_id)
        within_s = self._client.config.control_s
        if not await self._flights.ended(flights, within_s):
            raise DeadlineError("the end of the aborted generations", seconds=within_s)

    async def resume(self) -> None:
        """Sample again, unless an update is under way, which then does it at its end."""
        self._paused = False
        if not self._updating:
            await self._continue()

    async def update(self, carrier: Carrier, version: str) -> None:
        """Replace the full weights; adapters are dropped, and generations on them end.

        Raises:
            CheckpointError: they are not the model's, or SGLang refused them; the old ones are serving.
            PolicyError: nothing has happened; the code says why.
            TransportError: SGLang did not answer; the old ones are serving again.
            DeadlineError: it took too long; the old ones are serving again.
            GymError: `unfit` says why none are.
        """
        async with self._lock:
            await carrier.check()
            async with self._held():
                # on other weights their adapter means nothing
                self._flights.fail(_dropped(version), adapted=True)
                try:
                    await self._send(carrier, version)
                except BaseException as error:
                    with anyio.CancelScope(shield=True):
                        said = await self._recover(carrier, error)
                    if said is None or not isinstance(error, GymError):
                        raise
                    raise self._failed(carrier, error, said) from error
                self.base, self._folder, self.unfit = version, carrier.folder, None
                self.epoch += 1
                self._adapters.drop()
        logger.debug("weights are now of version %s", version)

    async def adapt(self, folder: Path, version: str) -> None:
        """Sample new requests with an adapter on the present weights; nothing is paused for it."""
        async with self._lock:
            if self.unfit is not None:
                raise GymError(f"{self.unfit}; an adapter does not mend them")
            await self._adapters.load(folder, version, base=self.base)

    async def _pause(self, mode: PauseMode) -> None:
        await self._client.post("/pause_generation", {"mode": mode})
        # the pause is answered before the scheduler has it; this is answered by the scheduler, and after it
        await self._client.get("/server_info")

    async def _continue(self) -> None:
        try:
            await self._client.post("/continue_generation", {})
        finally:
            self._open()

    def _open(self) -> None:
        for flight in self._flights:
            if flight.gated:
                flight.open(self.version, self.epoch, self._adapters.current)

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        """Hold sampling, whatever comes, and let go of every cache of running requests."""
        self._updating = True
        try:
            await self._pause("retract")
            yield
        finally:
            self._updating = False
            if not self._paused:
                # a server that stays paused for an error is worse than either version of the weights
                with anyio.CancelScope(shield=True):
                    await self._continue()

    async def _send(self, carrier: Carrier, version: str) -> None:
        within_s = self._client.config.update_s
        try:
            async with asyncio.timeout(within_s) as limit:
                await carrier.send(version)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError("the weight update", seconds=within_s) from error

    async def _recover(self, carrier: Carrier, error: BaseException) -> str | None:
        """Bring the old weights back after a failure; return which weights there are now, if it matters."""
        if not carrier.touched:
            return None
        if self._folder is None:
            why = "the old ones came by no folder from which they could be loaded again"
        else:
            try:
                await self._send(FolderCarrier(self._client, self._facts, self._folder), self.base)
                return "the old weights are serving"
            except GymError as second:
                why = f"the old ones could not be loaded again from {self._folder} ({second})"
        self.unfit = (
            f"SGLang may hold a mixture of weights: an update failed ({type(error).__name__}: {error}), and "
            f"{why}. Nothing is sampled until an update with full weights succeeds"
        )
        logger.error("%s", self.unfit)
        self._flights.fail(TransportError(self.unfit, retryable=True))
        return self.unfit

    def _failed(self, carrier: Carrier, error: GymError, said: str) -> GymError:
        if self.unfit is not None:
            return GymError(said)
        match error:
            case DeadlineError():
                return DeadlineError(f"the weight update ({said})", seconds=error.seconds)
            case TransportError():
                return TransportError(f"{error}; {said}", retryable=error.retryable, status=error.status)
            case PolicyError():
                return CheckpointError(f"{error}; {said}", path=carrier.name)
        return GymError(f"{error}; {said}")


def _dropped(version: str) -> TransportError:
    return TransportError(
        f"the adapter that sampled this was dropped when full weights ({version!r}) came", retryable=True
    )
