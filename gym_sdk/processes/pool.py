"""Up to so many worker processes that run one function."""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.lowlevel import RunVar

from gym_sdk.deadline import Deadline
from gym_sdk.errors import ConfigurationError, DeadlineError
from gym_sdk.processes.worker import Worker, WorkerError

__all__ = ["PoolConfig", "WorkerPool"]

_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """How many worker processes a function gets, and what they may use.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    workers: int | None = None
    """Processes at most; by default one for each core, up to 4."""
    timeout_s: float = 60.0
    """Deadline of one call, in seconds; then its worker is killed. Waiting for a free worker and its start
    does not count."""
    max_calls_per_worker: int | None = None
    """A worker is replaced after so many calls: for code that leaks."""
    memory_limit: int | None = None
    """Most address space of a worker, in bytes; beyond it, allocations fail with `MemoryError`."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} of a function in a process must be positive, not {value}")

    @property
    def size(self) -> int:
        """Processes at most."""
        return self.workers or min(4, os.cpu_count() or 1)


class WorkerPool:
    """Processes (up to `config.size` in each event loop) that run one function.

    They start when they are needed and are replaced when they die, hang or are cancelled. They are plain
    processes with sockets, so that a pool outlives an event loop: a verifier made once serves several
    `asyncio.run` calls. `anyio.to_process` would tie them to one loop, and would run the user's main module
    again in each. All end with `close()`, with the pool, and with this process, even when it is killed.

    Attributes:
        function: what runs in the processes, if it is known here.
    """

    def __init__(
        self, target: str, config: PoolConfig | None = None, *, function: Callable[..., Any] | None = None
    ) -> None:
        """Set up an empty pool.

        Args:
            target: `module:qualname` of the function, as a worker imports it.
            config: limits.
            function: the function itself; without it this process never imports its module.
        """
        self.function = function
        self._target = target
        self._name = target.partition(":")[2]
        self._config = config or PoolConfig()
        self._idle: list[Worker] = []
        self._alive: set[Worker] = set()
        self._owner = os.getpid()
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar(f"{target} {id(self)}")
        weakref.finalize(self, _kill_all, self._alive, self._owner)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.pid for worker in list(self._alive)]

    async def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in a worker; on cancellation or timeout that worker is killed.

        Raises:
            DeadlineError: no answer in time.
            WorkerDiedError: the worker ended instead of answering.
            WorkerError: arguments or result cannot be sent, or the function's module cannot be imported.
            Exception: whatever the function raises, with the worker's traceback as a note.
        """
        try:
            request = pickle.dumps((args, kwargs), protocol=5)
        except Exception as error:
            raise WorkerError(
                f"the arguments of {self._name} cannot be sent to a process: {error}; pass plain data"
            ) from error
        async with self._slots():
            worker = await self._take()
            try:
                with Deadline(self._config.timeout_s) as deadline:
                    reply = await worker.ask(request)
            except BaseException:
                self._drop(worker)
                raise
            if deadline.expired:
                self._drop(worker)
                raise DeadlineError(self._name, seconds=self._config.timeout_s)
            self._give_back(worker)
        return self._result(reply)

    def close(self) -> None:
        """End all workers, as at exit and when the pool is garbage. A later call starts new ones."""
        self._idle.clear()
        _kill_all(self._alive, self._owner)

    def _result(self, reply: bytearray) -> Any:
        try:
            kind, value, trace = pickle.loads(reply)
        except Exception as error:
            raise WorkerError(f"what {self._name} returned cannot be read here: {error}") from error
        if kind == "returned":
            return value
        if kind == "unsendable":
            raise WorkerError(f"{self._name} runs in a process, and {value}")
        raised = value if kind == "raised" else WorkerError(value)
        raised.add_note(f"In the worker process:\n{trace}")
        raise raised

    async def _take(self) -> Worker:
        if os.getpid() != self._owner:  # this process was forked: the workers are its parent's
            self._idle.clear()
            self._alive.clear()
            self._owner = os.getpid()
        while self._idle:
            worker = self._idle.pop()
            if worker.running:
                return worker
            self._drop(worker)
        worker = Worker()
        self._alive.add(worker)
        try:
            with Deadline(_START_TIMEOUT_S) as deadline:
                await worker.greet(self._target, self._config.memory_limit)
        except BaseException:
            self._drop(worker)
            raise
        if deadline.expired:
            self._drop(worker)
            raise DeadlineError(f"starting a worker process of {self._name}", seconds=_START_TIMEOUT_S)
        return worker

    def _give_back(self, worker: Worker) -> None:
        worker.calls += 1
        if worker.calls == self._config.max_calls_per_worker or worker not in self._alive:
            self._drop(worker)
        else:
            self._idle.append(worker)

    def _drop(self, worker: Worker) -> None:
        self._alive.discard(worker)
        worker.kill()

    def _slots(self) -> anyio.CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            limiter = anyio.CapacityLimiter(self._config.size)
            self._limiter.set(limiter)
            return limiter


def _kill_all(workers: set[Worker], owner: int) -> None:
    while workers:
        worker = workers.pop()
        if os.getpid() == owner:  # not in a forked copy of this process
            worker.kill(wait=True)
