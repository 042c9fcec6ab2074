"""Pausing SGLang and replacing its weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from backends.engine import PauseMode
from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.flight import Flight, Flights
from backends.sglang.weights import check_folder
from gym_sdk.errors import CheckpointError, ConfigurationError, DeadlineError, GymError, PolicyError

__all__ = ["Control"]

logger = logging.getLogger(__name__)


class Control:
    """Whether one SGLang samples, and with which weights.

    Attributes:
        version: the label of the weights.
        epoch: how often they were replaced.
    """

    def __init__(self, client: SGLangClient, facts: Facts, flights: Flights) -> None:
        self.version = facts.weight_version
        self.epoch = 0
        self._client = client
        self._signature = facts.signature
        self._served = facts.model_path
        self._flights = flights
        self._paused = False
        self._updating = False
        self._lock = asyncio.Lock()

    @property
    def closed(self) -> bool:
        """Whether SGLang holds new requests back."""
        return self._paused or self._updating

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

    async def update(self, folder: Path, version: str) -> None:
        """Replace the weights by those of a folder; see `Engine.update_weights`."""
        async with self._lock:
            await asyncio.to_thread(check_folder, folder, self._signature)
            async with self._held():
                await self._load(folder, version)

    async def _pause(self, mode: PauseMode) -> None:
        await self._client.post("/pause_generation", {"mode": mode})
        # the pause is answered before the scheduler has it; this is answered by the scheduler, and after it
        await self._client.get("/server_info")

    async def _continue(self) -> None:
        await self._client.post("/continue_generation", {})
        for flight in self._flights:
            if flight.gated:
                flight.opened(self.version)

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

    async def _load(self, folder: Path, version: str) -> None:
        try:
            await self._send(str(folder), version)
        except PolicyError as error:
            await self._restore(folder, error)
            raise CheckpointError(f"{error}; the old weights are serving", path=folder) from error
        self.version, self._served = version, str(folder)
        self.epoch += 1
        logger.debug("weights are now of version %s", version)

    async def _send(self, path: str, version: str) -> None:
        body = {
            "model_path": path,
            "weight_version": version,
            "abort_all_requests": False,
            "flush_cache": True,
        }
        within_s = self._client.config.update_s
        await self._client.post("/update_weights_from_disk", body, within_s=within_s)

    async def _restore(self, folder: Path, error: PolicyError) -> None:
        """Load the old weights again: SGLang's own way back reloads the folder that failed."""
        try:
            await self._send(self._served, self.version)
        except GymError as second:
            raise GymError(
                f"{error}. The old weights could not be loaded again from {self._served} ({second}): SGLang "
                "may hold a mixture of both. Start it again"
            ) from second
