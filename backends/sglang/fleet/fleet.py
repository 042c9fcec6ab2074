"""Several SGLangs as one engine: routing, and the same weights on all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio

from backends.engine import (
    BroadcastWeights,
    EngineInfo,
    FinishReason,
    Generation,
    GenerationChunk,
    GenerationRequest,
    PauseMode,
    TensorWeights,
    WeightsGroup,
    WeightSource,
)
from backends.sglang.client import UnreachableError
from backends.sglang.config import FleetConfig, SGLangConfig
from backends.sglang.engine import SGLangEngine
from backends.sglang.facts import Facts
from backends.sglang.fleet.replica import Replica
from backends.sglang.fleet.roster import Roster
from backends.sglang.process import SGLangProcess
from backends.sglang.weights.carriers import unknown_group
from gym_sdk.errors import ConfigurationError, GymError, TransportError

__all__ = ["SGLangFleet"]

logger = logging.getLogger(__name__)

_FULL = 503
"""What SGLang answers where its queue is full; nothing was sampled then."""


class SGLangFleet:
    """One engine over any number of SGLangs with the same model and the same weights.

    Requests that share `GenerationRequest.affinity` go to one replica as long as the load allows
    (`backends.sglang.fleet.routing`). A replica that does not answer is left out: its requests end with a
    `TransportError` that may be retried, and new ones go to others, or wait for one. It comes back by itself,
    after the weights that serve by then were loaded into it. One that can't be brought up to date, because
    they came as tensors, gets no requests until the next update, which goes to all.

    What was never sent, because no connection could be made or SGLang's queue was full, is sent to another
    replica. Everything else is the caller's to retry, since tokens may have been sampled.

    Make it by `connect`; use it as `async with`, or call `aclose`, which leaves SGLang running.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._groups: dict[str, set[SGLangEngine]] = {}
        self._ids: set[str] = set()
        self._held: dict[str, anyio.CancelScope] = {}
        self._updates: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def connect(
        cls,
        addresses: Sequence[str],
        *,
        model: str | Path | None = None,
        api_key: str | None = None,
        config: SGLangConfig | None = None,
        watch: FleetConfig | None = None,
        processes: Mapping[str, SGLangProcess] | None = None,
    ) -> Self:
        """Connect to running SGLangs. One at least must answer; the others are waited for in the background.

        Args:
            addresses: their roots; that of an sglang-router stands for its workers, also for those that join
                or leave it later.
            model: folder of the model; see `SGLangEngine.connect`.
            api_key: their `--admin-api-key` or `--api-key`.
            config: deadlines of requests.
            watch: how they are watched.
            processes: those that were started here, by address.

        Raises:
            ConfigurationError: one cannot be used, or they serve different models or weights.
            TransportError: none answers.
            DeadlineError: none answers in time; they may be paused.
        """
        if not addresses:
            raise ConfigurationError("name the address of at least one SGLang")
        watch = watch or FleetConfig()

        def make(url: str) -> Replica:
            return Replica(
                url,
                model=model,
                api_key=api_key,
                config=config or SGLangConfig(),
                watch=watch,
                process=(processes or {}).get(url),
            )

        roster = Roster(addresses, make, watch=watch, api_key=api_key)
        try:
            await roster.open()
        except BaseException:
            await roster.aclose()
            raise
        return cls(roster)

    @property
    def facts(self) -> Facts:
        """What the first replica was when it was taken in."""
        return self._roster.served.facts

    @property
    def info(self) -> EngineInfo:
        """Sizes, the weight version, the load, and the replicas."""
        served, there = self._roster.served, [engine.info for engine in self._roster.engines]
        # of a single one, the version that it says itself: somebody else may have replaced its weights
        version = there[0].weight_version if len(self._roster.replicas) == len(there) == 1 else served.version
        return EngineInfo(
            vocab_size=served.facts.vocab_size,
            context_length=served.facts.context_length,
            weight_version=version,
            running=sum(info.running for info in there),
            waiting=sum(info.waiting for info in there) + len(self._held),
            replicas=tuple(replica.info for replica in self._roster.replicas),
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """Generate to the end on one of the replicas; raises as `SGLangEngine.generate` does.

        Raises:
            TransportError: also where no replica served for `FleetConfig.away_s`, or none will again.
        """
        with self._named(request):
            refused: set[str] = set()
            while (replica := await self._replica(request, refused)) is not None:
                try:
                    async with _occupied(replica) as engine:
                        return await engine.generate(request)
                except TransportError as error:
                    await self._failed(replica, error, refused)
            return Generation([], [], FinishReason.ABORT, ())

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Generate on one of the replicas and yield chunks; raises as `generate` does."""
        with self._named(request):
            refused: set[str] = set()
            while (replica := await self._replica(request, refused)) is not None:
                began = False
                try:
                    async with _occupied(replica) as engine, _chunks(engine, request) as chunks:
                        async for chunk in chunks:
                            began = True
                            yield chunk
                    return
                except TransportError as error:
                    if began:
                        replica.suspect()
                        raise
                    await self._failed(replica, error, refused)
            yield GenerationChunk([], [], self.info.weight_version, FinishReason.ABORT)

    async def abort(self, request_id: str | None = None) -> int:
        """Abort one request, or all; return how many. They end with `FinishReason.ABORT`."""
        held = [scope for name, scope in self._held.items() if request_id in (None, name)]
        for scope in held:
            scope.cancel()
        return len(held) + sum([await engine.abort(request_id) for engine in self._roster.engines])

    async def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop sampling on all replicas when this returns; see `SGLangEngine.pause`."""
        async with self._roster.lock:
            before, self._roster.paused = self._roster.paused, mode
            try:
                await _all(engine.pause(mode) for engine in self._roster.engines)
            except BaseException:
                self._roster.paused = before
                if before is None:  # no replica stays paused for the failure of another
                    with anyio.CancelScope(shield=True):
                        resumed = (engine.continue_generation() for engine in self._roster.engines)
                        await asyncio.gather(*resumed, return_exceptions=True)
                raise

    async def continue_generation(self) -> None:
        """Resume after `pause`; without effect if not paused."""
        async with self._roster.lock:  # a replica that is just coming in may be about to be paused
            self._roster.paused = None
            await _all(engine.continue_generation() for engine in self._roster.engines)

    async def update_weights(self, source: WeightSource, *, version: str) -> None:
        """Replace the weights of all replicas; raises as `SGLangEngine.update_weights` does.

        It succeeds if one replica at least took them; the others are left out until they have them, too.
        Leaving this call early stops an update from tensors, which are the caller's own, but not one from a
        folder, lest two replicas stay apart.

        Raises:
            PolicyError: the weights come over a group that is not known (any more), because a replica was
                started again or joined (`weights_group_unknown`).
        """
        if isinstance(source, TensorWeights | BroadcastWeights):
            await self._update(source, version)
            return
        task = asyncio.create_task(self._update(source, version))
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        await asyncio.shield(task)

    @property
    def ranks(self) -> int:
        """How many processes of a weights group the replicas are that are there now."""
        return sum(engine.ranks for engine in self._roster.engines)

    async def join_group(self, group: WeightsGroup) -> None:
        """Have all replicas join a group over which weights will come; see `SGLangEngine.join_group`."""
        async with self._roster.lock:
            engines, rank, joins = self._roster.engines, group.first_rank, []
            for engine in engines:
                joins.append(engine.join_group(replace(group, first_rank=rank)))
                rank += engine.ranks
            await _all(joins)
            self._groups[group.name] = set(engines)

    async def leave_group(self, name: str) -> None:
        """Have all replicas leave a group; without effect if it is not known."""
        async with self._roster.lock:
            self._groups.pop(name, None)
            await _all(engine.leave_group(name) for engine in self._roster.engines)

    async def post(
        self, path: str, body: Mapping[str, Any], *, within_s: float | None = None
    ) -> dict[str, Any]:
        """Ask any replica something that has nothing to do with the weights, as `SGLangClient.post` does."""
        replica = await self._roster.pick(None, ())
        return await replica.post(path, body, within_s=within_s)

    async def aclose(self) -> None:
        """Abort everything and close the connections; SGLang keeps running."""
        self._closed = True
        for task in self._updates:
            task.cancel()
        await asyncio.gather(*self._updates, return_exceptions=True)
        for scope in self._held.values():
            scope.cancel()
        await self._roster.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @contextmanager
    def _named(self, request: GenerationRequest) -> Iterator[None]:
        """Keep a request's id to itself."""
        if self._closed:
            raise GymError("the engine is closed")
        if request.request_id in self._ids:
            raise ConfigurationError(f"request id {request.request_id!r} is in use")
        self._ids.add(request.request_id)
        try:
            yield
        finally:
            self._ids.discard(request.request_id)

    async def _replica(self, request: GenerationRequest, refused: set[str]) -> Replica | None:
        """Return the replica for a request; None if it is aborted while it waits for one."""
        with anyio.CancelScope() as self._held[request.request_id]:
            try:
                return await self._roster.pick(request.affinity, refused)
            finally:
                del self._held[request.request_id]
        return None

    async def _failed(self, replica: Replica, error: TransportError, refused: set[str]) -> None:
        """Return if the request may go to another replica; raise what has happened otherwise."""
        replica.suspect()
        if isinstance(error, UnreachableError):
            await self._roster.lose(replica, str(error))
            return
        refused.add(replica.url)
        others = any(one.serves and one.url not in refused for one in self._roster.replicas)
        if error.status != _FULL or not others:
            raise error

    async def _update(self, source: WeightSource, version: str) -> None:
        roster = self._roster
        await roster.somebody()
        async with roster.lock:
            there = [replica for replica in roster.replicas if replica.engine is not None]
            engines = roster.engines
            if not there:
                raise TransportError(roster.complaint(), retryable=True)
            if isinstance(source, BroadcastWeights) and self._groups.get(source.group) != set(engines):
                raise unknown_group(source.group)
            cancelled, failures = await _ends(
                engine.update_weights(source, version=version) for engine in engines
            )
            if None in failures:
                roster.served.took(source, version)
                for replica, failure in zip(there, failures, strict=True):
                    replica.problem = None if failure is None else f"it did not take the weights: {failure}"
                    if failure is not None:
                        logger.error("SGLang at %s did not take %s: %s", replica.url, version, failure)
            elif not cancelled:
                raise min((one for one in failures if one), key=lambda one: isinstance(one, TransportError))
        roster.changed()
        if cancelled:
            raise asyncio.CancelledError


@asynccontextmanager
async def _occupied(replica: Replica) -> AsyncIterator[SGLangEngine]:
    """Count a request among those of its replica."""
    assert replica.engine is not None
    replica.in_flight += 1
    try:
        yield replica.engine
    finally:
        replica.in_flight -= 1


@asynccontextmanager
async def _chunks(
    engine: SGLangEngine, request: GenerationRequest
) -> AsyncIterator[AsyncIterator[GenerationChunk]]:
    stream = engine.stream(request)
    try:
        yield stream
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """Wait for all; then raise the first error."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if result is not None:
            raise result


async def _ends(calls: Iterable[Awaitable[None]]) -> tuple[bool, list[BaseException | None]]:
    """Wait for all; if this is cancelled, cancel them, and wait for how they end.

    Returns:
        Whether it was cancelled, and the error of each call; None of those that succeeded.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    cancelled = False
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        cancelled = True
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait(tasks)
    return cancelled, [
        asyncio.CancelledError("cancelled") if task.cancelled() else task.exception() for task in tasks
    ]
