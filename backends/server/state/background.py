"""Responses that are made while nobody waits for them (`background: true`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from backends.server.errors import BusyError, problem_of
from backends.server.state.stored import ResponseStore, StoredResponse, failed, try_keep
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Response

__all__ = ["BackgroundLimits", "BackgroundRuns", "Run", "Work"]

_log = logging.getLogger(__name__)

_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class BackgroundLimits:
    """How much runs in the background, and what is left of it.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    max_runs: int = 256
    """Runs at once; more are refused with 429."""
    retry_after_s: float = 1.0
    """After how long who was refused should ask again."""
    log_s: float = 600.0
    """How long the events of a finished run can still be read; the response itself is in the store."""
    max_logs: int = 256
    """Of how many finished runs, at most; the oldest go first."""
    abort_s: float = 10.0
    """How long a cancellation, and the end of the server, wait for a run to stop."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigurationError(
                    f"BackgroundLimits.{name} must be positive, not {getattr(self, name)}"
                )


class Run:
    """One response in the making.

    Whoever makes it sets `response` whenever there is news and, if the run is `streamed`, writes its events,
    those of a failure included. Any number of readers can follow.

    Attributes:
        response: the newest state.
        streamed: whether the run was asked for as a stream; otherwise it has no events.
    """

    def __init__(self, stored: StoredResponse, *, streamed: bool) -> None:
        self.response: Response = stored.response
        self.streamed = streamed
        self._asked = stored
        self._log: list[bytes] = []
        self._ended = False
        self._news = asyncio.Event()
        self._when_ended: list[Callable[[], None]] = []

    @property
    def stored(self) -> StoredResponse:
        """The newest state, as it is kept."""
        return replace(self._asked, response=self.response)

    def write(self, events: bytes) -> None:
        """Add whole server-sent events. The n-th of a run, counted from 0, has the sequence number n."""
        self._log += [event + _END for event in events.split(_END) if event]
        self._wake()

    async def after(self, number: int) -> list[bytes]:
        """Return the events after the one with this sequence number; wait for one if there is none yet.

        Returns:
            At least one event; none if the run has ended and there are no more.
        """
        while len(self._log) <= number + 1 and not self._ended:
            await self._news.wait()
        return self._log[number + 1 :]

    async def events(self, starting_after: int = -1) -> AsyncIterator[bytes]:
        """Yield the events after the one with this sequence number, until the run ends."""
        while news := await self.after(starting_after):
            for event in news:
                yield event
            starting_after += len(news)

    def end(self) -> None:
        """Note that nothing more comes."""
        self._ended = True
        self._wake()
        for callback in self._when_ended:
            callback()

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call back when nothing more comes, however the run ends, and even if its maker never began."""
        self._when_ended.append(callback)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


Work: TypeAlias = Callable[[Run], Awaitable[None]]
"""Makes a response. It is cancelled when the run is, and may write last events then."""


@dataclass(slots=True)
class _Task:
    """A run that has not finished: what makes its response, and what keeps that."""

    run: Run
    work: asyncio.Future[None]
    keeper: asyncio.Task[None]
    is_unwanted: bool = False


class BackgroundRuns:
    """The runs of one server, and for a while the events of those that have finished.

    A run's response is in the store from its beginning, so that one that a crash ended is known as well.

    Args:
        store: gets the responses; stays the caller's to close.
        limits: how much there may be.
    """

    def __init__(self, store: ResponseStore, limits: BackgroundLimits | None = None) -> None:
        self.limits = limits or BackgroundLimits()
        self._store = store
        self._starting = 0
        self._tasks: dict[tuple[str, str], _Task] = {}
        self._finished: OrderedDict[tuple[str, str], tuple[Run, float]] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks) + self._starting

    async def start(self, stored: StoredResponse, work: Work, *, streamed: bool = False) -> Run:
        """Start a run; return when its response is kept.

        Args:
            stored: the response as it is before it is made (`queued`), and what it is made from.
            work: makes it, and leaves it in `run.response`, finished.
            streamed: whether it was asked for as a stream.

        Raises:
            BusyError: as many as may be are running (429), or the server stops (503).
            PolicyError: the store has no room (507).
        """
        self._check_room()
        self._starting += 1
        try:
            await self._store.keep(stored)
            self._check_open()
        finally:
            self._starting -= 1
        key = (stored.scope, stored.id)
        run = Run(stored, streamed=streamed)
        working = asyncio.ensure_future(work(run))
        self._tasks[key] = _Task(run, working, asyncio.create_task(self._finish(key, working)))
        return run

    def get(self, response_id: str, scope: str) -> Run | None:
        """Return a run, if it has not finished, or its events can still be read."""
        self._drop_logs()
        key = (scope, response_id)
        if key in self._tasks:
            return self._tasks[key].run
        return self._finished[key][0] if key in self._finished else None

    def is_running(self, response_id: str, scope: str) -> bool:
        """Whether a response is still in the making."""
        return (scope, response_id) in self._tasks

    async def cancel(self, response_id: str, scope: str) -> None:
        """Cancel a run and wait until it has stopped; without effect on what doesn't run."""
        task = self._tasks.get((scope, response_id))
        if task is None:
            return
        task.is_unwanted = True
        await self._stop([task])

    def forget(self, response_id: str, scope: str) -> None:
        """Drop the events of a finished run."""
        self._finished.pop((scope, response_id), None)

    async def aclose(self) -> None:
        """End all runs, and wait until their responses are kept, as failed."""
        self._closed = True
        await self._stop(list(self._tasks.values()))
        self._finished.clear()

    async def _stop(self, tasks: list[_Task]) -> None:
        for task in tasks:
            task.work.cancel()
        if tasks:
            _, waiting = await asyncio.wait([task.keeper for task in tasks], timeout=self.limits.abort_s)
            if waiting:
                _log.error("%d background runs do not stop", len(waiting))

    async def _finish(self, key: tuple[str, str], working: asyncio.Future[None]) -> None:
        """Wait for a run, see to it that its response is finished, and keep that."""
        await asyncio.wait({working})
        task = self._tasks[key]
        run = task.run
        try:
            if not run.stored.is_finished:
                run.response = self._ending(task)
            await try_keep(self._store, run.stored)
        finally:
            run.end()
            del self._tasks[key]
            self._finished[key] = (run, time.monotonic() + self.limits.log_s)
            self._drop_logs()

    def _ending(self, task: _Task) -> Response:
        """Return how a response ends whose maker left it unfinished."""
        run, work = task.run, task.work
        if task.is_unwanted:
            return run.response.model_copy(update={"status": "cancelled"})
        if work.cancelled():
            return failed(run.response, "the server stopped before this was done")
        error = work.exception()
        if not isinstance(error, Exception):
            return failed(run.response, "it ended without an answer")
        problem = problem_of(error)
        if problem.status >= 500:
            _log.error("the background response %s failed", run.response.id, exc_info=error)
        return failed(
            run.response, problem.message, "server_error" if problem.status >= 500 else "invalid_prompt"
        )

    def _check_room(self) -> None:
        self._check_open()
        if len(self) >= self.limits.max_runs:
            raise BusyError(
                f"{len(self)} responses are made in the background, the most that this server takes at once",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=self.limits.retry_after_s,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise BusyError(
                "the server is about to stop and takes no more model calls",
                status=503,
                code="server_stopping",
                retry_after_s=self.limits.retry_after_s,
            )

    def _drop_logs(self) -> None:
        now = time.monotonic()
        while self._finished:
            _, expires_at = next(iter(self._finished.values()))
            if len(self._finished) <= self.limits.max_logs and expires_at > now:
                break
            self._finished.popitem(last=False)
