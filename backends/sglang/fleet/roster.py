"""The replicas of a fleet: who belongs to it, who is well, and who gets the next request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import aiohttp

from backends.engine import PauseMode
from backends.sglang.client import clean_address
from backends.sglang.config import FleetConfig
from backends.sglang.engine import SGLangEngine
from backends.sglang.fleet.addresses import workers
from backends.sglang.fleet.replica import Replica
from backends.sglang.fleet.routing import route
from backends.sglang.fleet.served import Served
from gym_sdk.errors import CheckpointError, ConfigurationError, DeadlineError, GymError, TransportError

__all__ = ["Roster"]

logger = logging.getLogger(__name__)

_LISTED_EVERY = 5
"""How many looks at a replica to one at a router's list."""


class Roster:
    """Watches the replicas as long as it is open.

    Args:
        addresses: roots of SGLangs, or of routers that list them.
        make: makes a replica of an address.
        watch: how often and how long.
        api_key: for routers.

    Attributes:
        lock: held while weights, pauses or groups change.
        paused: how all replicas are paused; None while they sample.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        make: Callable[[str], Replica],
        *,
        watch: FleetConfig,
        api_key: str | None,
    ) -> None:
        self.lock = asyncio.Lock()
        self.paused: PauseMode | None = None
        self._addresses = [clean_address(url) for url in addresses]
        self._make = make
        self._watch = watch
        self._api_key = api_key
        self._routers: list[str] = []
        self._replicas: dict[str, Replica] = {}
        self._served: Served | None = None
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def replicas(self) -> list[Replica]:
        """All of them, those that are away included."""
        return list(self._replicas.values())

    @property
    def engines(self) -> list[SGLangEngine]:
        """The engines of those that are there."""
        return [replica.engine for replica in self._replicas.values() if replica.engine is not None]

    @property
    def served(self) -> Served:
        """The weights that count."""
        assert self._served is not None
        return self._served

    async def open(self) -> None:
        """Take the replicas in; raises as `SGLangFleet.connect` does."""
        for url in await self._list():
            self._replicas[url] = self._make(url)
        if not self._replicas:
            raise ConfigurationError(f"the router at {self._routers[0]} lists no workers")
        errors = [error for error in await asyncio.gather(*map(_take_in, self.replicas)) if error is not None]
        for error in errors:
            if not isinstance(error, TransportError | DeadlineError) or len(errors) == len(self.replicas):
                raise error
        self._check_alike()
        for replica in self.replicas:
            self._follow(replica)
        if self._routers:
            self._start(self._follow_routers())

    def _check_alike(self) -> None:
        first, *others = [replica for replica in self.replicas if replica.engine is not None]
        assert first.engine is not None
        self._served = Served(first.engine.facts)
        first.problem = None
        for replica in others:
            assert replica.engine is not None
            self._served.check_model(replica.url, replica.engine)
            if not self._served.has(replica.engine):
                raise ConfigurationError(
                    f"SGLang at {replica.url} has other weights ({replica.engine.facts.weight_version!r}) "
                    f"than the one at {first.url} ({first.engine.facts.weight_version!r}); start one of them "
                    "again, or load the same folder into both"
                )
            replica.problem = None

    async def _list(self) -> list[str]:
        """Return the addresses of all replicas, and note which of the given ones are routers."""
        found: dict[str, None] = {}
        for url in self._addresses:
            listed: list[str] | None = None
            with suppress(aiohttp.ClientError, TimeoutError):
                listed = await workers(url, api_key=self._api_key)
            if listed is not None and url not in self._routers:
                self._routers.append(url)
            if url not in self._routers:
                listed = [url]
            elif listed is None:  # a router that is away for a moment
                listed = list(self._replicas)
            found.update(dict.fromkeys(listed))
        return list(found)

    async def pick(self, affinity: str | None, without: Collection[str]) -> Replica:
        """Return the replica for a request; wait while none serves.

        Args:
            affinity: what belongs together.
            without: addresses that have refused the request.

        Raises:
            TransportError: none served in time, or none will again.
        """
        found: list[Replica] = []

        def find() -> bool:
            loads = {replica.url: replica.in_flight for replica in self.replicas if replica.serves}
            if loads:
                fresh = {url: load for url, load in loads.items() if url not in without}
                found.append(self._replicas[route(affinity, fresh or loads)])
            return bool(loads)

        await self._until(find)
        return found[0]

    async def somebody(self) -> None:
        """Wait while no replica is there at all; raises as `pick` does."""
        await self._until(lambda: bool(self.engines))

    async def _until(self, condition: Callable[[], bool]) -> None:
        until = asyncio.get_running_loop().time() + self._watch.away_s
        while not condition():
            if all(replica.gone for replica in self.replicas):
                raise TransportError(self.complaint(), retryable=True)
            try:
                async with asyncio.timeout_at(until):
                    await self._changed.wait()
            except TimeoutError:
                raise TransportError(
                    f"{self.complaint()} (waited {self._watch.away_s:g} s)", retryable=True
                ) from None

    def complaint(self) -> str:
        """Return why no replica serves."""
        return "no SGLang serves: " + "; ".join(
            f"{replica.url}: {replica.why}" for replica in self.replicas if replica.why is not None
        )

    async def lose(self, replica: Replica, why: str) -> None:
        """Leave a replica out until it answers again."""
        await replica.lose(why)
        self.changed()

    def changed(self) -> None:
        """Wake who waits for a replica."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def aclose(self) -> None:
        """Stop watching and close all engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.aclose() for replica in self.replicas))
        self.changed()

    def _follow(self, replica: Replica) -> None:
        self._start(self._look_after(replica))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_after(self, replica: Replica) -> None:
        while replica.listed or replica.in_flight:
            await replica.rest()
            if replica.engine is None and replica.gone:
                replica.give_up()
                self.changed()
                return
            try:
                if replica.engine is None:
                    await self._welcome(replica)
                elif not self.lock.locked() and (why := await replica.ailing()) is not None:
                    await self.lose(replica, why)
            except Exception:  # whoever stops looking never takes it in again
                logger.exception("looking after SGLang at %s failed; it is tried again", replica.url)
        await replica.aclose()
        del self._replicas[replica.url]

    async def _welcome(self, replica: Replica) -> None:
        """Take a replica in that was away, if it answers; for requests only with the weights that count."""
        try:
            engine = await replica.connect()
        except GymError as error:
            replica.note(error)
            return
        try:
            async with self.lock:
                self.served.check_model(replica.url, engine)
                problem = await self._bring(replica, engine)
                if self.paused is not None:
                    await engine.pause(self.paused)
                replica.engine, replica.problem = engine, problem
        except BaseException as error:
            await engine.aclose()
            if not isinstance(error, GymError):
                raise
            replica.note(error)
            return
        self.changed()

    async def _bring(self, replica: Replica, engine: SGLangEngine) -> str | None:
        """Bring the weights that count; return why that is not possible."""
        try:
            await self.served.bring(replica.url, engine)
        except (ConfigurationError, CheckpointError) as error:
            logger.warning("%s", error)
            return str(error)
        logger.info("SGLang at %s serves the weights %s", replica.url, self.served.version)
        return None

    async def _follow_routers(self) -> None:
        """Take in what routers list anew, and let go of what they list no more."""
        while True:
            await asyncio.sleep(_LISTED_EVERY * self._watch.check_s)
            try:
                listed = await self._list()
            except ConfigurationError as error:
                logger.warning("%s", error)
                continue
            for url in listed:
                if url not in self._replicas:
                    self._replicas[url] = self._make(url)
                    self._follow(self._replicas[url])
            for replica in self.replicas:
                replica.listed = replica.url in listed


async def _take_in(replica: Replica) -> GymError | None:
    """Connect to a replica; return why that failed."""
    try:
        replica.engine = await replica.connect()
    except GymError as error:
        replica.note(error)
        return error
    return None
