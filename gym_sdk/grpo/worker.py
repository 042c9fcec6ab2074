"""A thread for blocking work that an event loop waits for, whatever happens to the waiter."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio

__all__ = ["Worker"]

T = TypeVar("T")


class Worker:
    """Runs blocking work in one thread, one piece at a time.

    One thread for all work, because each thread that computes with torch brings its own team of OpenMP
    threads.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gym-sdk-train")

    async def run(self, work: Callable[[threading.Event], T]) -> T:
        """Run `work` in the thread while the event loop goes on.

        If the caller is cancelled, the event that `work` gets is set, `work` is still waited for, and only
        then does the cancellation go on: nobody is left behind who changes shared state.
        """
        stop = threading.Event()
        future = asyncio.get_running_loop().run_in_executor(self._executor, work, stop)
        try:
            # asyncio's own cancellation (wait_for, timeout) passes through anyio's shields; this stops both.
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop.set()
            with anyio.CancelScope(shield=True):
                while not future.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # the caller left: nobody else will look at it
            raise

    def close(self) -> None:
        """Let the thread end; nothing can be run afterwards."""
        self._executor.shutdown(wait=False)
