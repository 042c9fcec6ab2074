"""Worker processes for work that needs a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

__all__ = ["WorkerDiedError", "WorkerPool"]

_START_TIMEOUT_S = 60.0


class WorkerDiedError(RuntimeError):
    """A worker process ended without an answer."""


class _Worker:
    """One process that answers JSON lines. Its methods block; a thread calls them."""

    def __init__(self, module: str) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerDiedError(f"the worker process ended with code {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask(self, request: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except OSError:
            raise WorkerDiedError(f"the worker process ended with code {self._process.wait()}") from None
        return self.read()

    def kill(self) -> None:
        """End the process. May be called twice, and while another thread reads."""
        with self._lock:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        continue  # a request that was still buffered has nowhere to go


class WorkerPool:
    """Up to `size` processes (in each event loop) that run one module and answer JSON requests.

    The processes are plain ones, read by threads, so that a pool outlives an event loop: a verifier made
    once serves several `asyncio.run` calls. `anyio.to_process` would tie them to one loop, and would run the
    user's main module again in each.
    """

    def __init__(self, module: str, *, size: int) -> None:
        """Set up an empty pool; processes start when they are needed.

        Args:
            module: run as `python -m module`; writes one line when it is ready, then one per request line.
            size: processes at most.
        """
        self._module = module
        self._size = size
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar(f"{module} {id(self)}")
        self._finalizer = weakref.finalize(self, _kill_all, self._alive)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.pid for worker in list(self._alive)]

    async def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Have a worker answer; on cancellation or timeout that worker is killed.

        Args:
            request: any JSON object.
            timeout_s: deadline of the answer in seconds, waiting for a free worker and its start not counted.

        Raises:
            TimeoutError: no answer in time.
            WorkerDiedError: the worker ended instead of answering.
        """
        line = json.dumps(request).encode() + b"\n"
        async with self._slots():
            worker = await self._take()
            try:
                with anyio.fail_after(timeout_s):
                    reply: dict[str, Any] = await _in_thread(worker.ask, line)
            except BaseException:
                self._drop(worker)
                raise
            self._idle.append(worker)
            return reply

    async def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.running:
                return worker
            self._drop(worker)
        worker = _Worker(self._module)
        self._alive.add(worker)
        try:
            with anyio.fail_after(_START_TIMEOUT_S):
                await _in_thread(worker.read)
        except BaseException:
            self._drop(worker)
            raise
        return worker

    def _drop(self, worker: _Worker) -> None:
        self._alive.discard(worker)
        worker.kill()

    def _slots(self) -> anyio.CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            limiter = anyio.CapacityLimiter(self._size)
            self._limiter.set(limiter)
            return limiter

    def close(self) -> None:
        """End all workers; also happens when the pool is garbage, and at exit."""
        self._finalizer()


async def _in_thread(function: Any, *args: Any) -> Any:
    # a limiter of its own: waiting for a process must not use up the threads of blocking tools
    return await anyio.to_thread.run_sync(
        function, *args, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
    )


def _kill_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().kill()
