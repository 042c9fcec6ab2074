"""Threads for blocking functions, counted for each event loop: those that hang do not stop the rest."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any

from anyio.lowlevel import RunVar

from gym_sdk.errors import GymError

__all__ = ["ThreadsExhaustedError", "WorkerThreads", "worker_threads"]

_log = logging.getLogger(__name__)

_SIZE = 64
_MAX_ABANDONED = 256
_IDLE_S = 10.0  # a thread without work ends after that


class ThreadsExhaustedError(GymError, RuntimeError):
    """Too many threads hang in functions that nobody waits for any more."""


class WorkerThreads:
    """The threads of one event loop in which blocking functions run.

    Python cannot stop a thread. One whose caller was cancelled, or ran out of time, is abandoned: it goes on
    beside the others and takes none of their places. Each such function is named once in the log. When
    `max_abandoned` threads hang like that, further calls fail at once instead of making the machine's last
    threads hang too; they work again when some of those threads have ended.

    The threads are daemons: a function that hangs does not keep the program from ending. `worker_threads()`
    returns the ones of the running loop; change the attributes there.

    Attributes:
        size: calls that run at once; further ones wait.
        max_abandoned: abandoned threads that may run beside them.
    """

    def __init__(self, *, size: int = _SIZE, max_abandoned: int = _MAX_ABANDONED) -> None:
        self.size = size
        self.max_abandoned = max_abandoned
        self._awaited = 0
        self._abandoned = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._warned: set[str] = set()
        self._crew = _Crew()
        weakref.finalize(self, self._crew.dismiss)

    @property
    def awaited(self) -> int:
        """Calls that run, or are about to, and that somebody waits for."""
        return self._awaited

    @property
    def abandoned(self) -> int:
        """Threads that still run although nobody waits for them."""
        return self._abandoned

    async def run(self, function: Callable[[], Any], name: str) -> Any:
        """Call a function in a thread, in the caller's context.

        When the caller is cancelled, the thread is abandoned and its result dropped.

        Args:
            function: takes nothing.
            name: what to call it in messages.

        Raises:
            ThreadsExhaustedError: too many threads are abandoned.
            Exception: whatever the function raises.
        """
        await self._admit()
        job = _Job(self, function, name, asyncio.get_running_loop())
        try:
            self._crew.start(job)
        except BaseException:  # the machine has no thread left
            self._leave()
            raise
        try:
            return await job.future
        except asyncio.CancelledError:
            if not job.settled:
                self._abandon(job)
            raise

    async def _admit(self) -> None:
        if self._abandoned >= self.max_abandoned:
            raise self._exhausted()
        if self._awaited < self.size and not self._waiting:
            self._awaited += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._serve()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._leave()
            raise

    def _serve(self) -> None:
        """Give free places to those who wait; with too many abandoned threads, tell them."""
        while self._waiting and (self._awaited < self.size or self._abandoned >= self.max_abandoned):
            place = self._waiting.popleft()
            if place.done():
                continue
            if self._abandoned >= self.max_abandoned:
                place.set_exception(self._exhausted())
            else:
                self._awaited += 1
                place.set_result(None)

    def _leave(self) -> None:
        self._awaited -= 1
        self._serve()

    def _abandon(self, job: _Job) -> None:
        job.abandoned = True
        self._abandoned += 1
        if not job.ended and job.name not in self._warned:
            self._warned.add(job.name)
            _log.warning(
                "%s still runs in a thread, and nobody waits for it any more: a thread cannot be stopped. "
                "Give the function a time limit of its own, or run it in a process (gym_sdk.processes)",
                job.name,
            )
        self._leave()

    def _settle(self, job: _Job) -> None:
        """A thread has finished a job. Runs on the loop."""
        self._crew.expect_work()
        job.settled = True
        if job.abandoned:
            self._abandoned -= 1
            self._serve()
        else:
            self._leave()

    def _exhausted(self) -> ThreadsExhaustedError:
        return ThreadsExhaustedError(
            f"{self._abandoned} threads hang in functions that nobody waits for any more "
            f"({', '.join(sorted(self._warned)[:5])}); give these functions time limits of their own, run "
            "them in processes (gym_sdk.processes.in_process), or raise worker_threads().max_abandoned"
        )


class _Job:
    """One call: made on the loop, run in a thread, settled on the loop."""

    __slots__ = ("_context", "_function", "_loop", "_pool", "abandoned", "ended", "future", "name", "settled")

    def __init__(
        self, pool: WorkerThreads, function: Callable[[], Any], name: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._pool = pool
        self._function = function
        self._loop = loop
        self._context = _context()
        self.name = name
        self.future: asyncio.Future[Any] = loop.create_future()
        self.ended = self.settled = self.abandoned = False

    def run(self) -> None:
        """Call the function. Runs in the thread."""
        result, error, process = None, None, os.getpid()
        try:
            result = self._context.run(self._function)
        except BaseException as caught:
            error = caught
        if os.getpid() != process:  # the function forked, and this is the copy: its result is nobody's
            os._exit(0)
        self.ended = True
        try:
            self._loop.call_soon_threadsafe(self._settle, result, error)
        except RuntimeError:
            return  # the loop is closed: there is nobody left to tell

    def _settle(self, result: Any, error: BaseException | None) -> None:
        self._pool._settle(self)
        if self.future.done():
            return
        # a future refuses the one, as a coroutine does; as for the other, nobody cancelled the caller
        if isinstance(error, StopIteration | asyncio.CancelledError):
            error = RuntimeError(f"{self.name} raised {type(error).__name__}")
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


def _context() -> Context:
    context = copy_context()
    # the thread has no event loop: the name of the caller's would keep the function from running one
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:
        context.run(sniffio.current_async_library_cvar.set, None)
    return context


class _Crew:
    """The threads themselves. Knows neither pool nor loop, so that their end ends the threads."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0  # threads that wait for a job that nobody has put yet
        self._count = 0

    def start(self, job: _Job) -> None:
        """Give a job to an idle thread, or to a new one."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                threading.Thread(target=self._work, name="gym-sdk worker", daemon=True).start()
                self._count += 1
            self._jobs.put(job)

    def expect_work(self) -> None:
        """Count a thread that has finished its job as idle."""
        with self._lock:
            self._idle += 1

    def dismiss(self) -> None:
        """End the threads, each when its job is done."""
        with self._lock:
            for _ in range(self._count):
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            del job  # it leads to the pool and the loop, which a waiting thread must not keep

    def _next(self) -> _Job | None:
        try:
            return self._jobs.get(timeout=_IDLE_S)
        except Empty:
            pass
        with self._lock:
            try:
                return self._jobs.get_nowait()
            except Empty:
                self._idle -= 1
                self._count -= 1
                return None


_threads: RunVar[WorkerThreads] = RunVar("gym_sdk worker threads")


def worker_threads() -> WorkerThreads:
    """Return the threads of the running event loop; set `size` and `max_abandoned` there.

    ```python
    worker_threads().size = 128
    ```
    """
    try:
        return _threads.get()
    except LookupError:
        made = WorkerThreads()
        _threads.set(made)
        return made
