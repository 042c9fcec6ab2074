"""Torch work in a thread that ends, so that it leaves no thread pool behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["aside"]

_T = TypeVar("_T")


def aside(function: Callable[[], _T]) -> _T:
    """Call a function in a thread of its own, and wait for it.

    Every thread that runs a parallel operator keeps an OpenMP pool until it ends. Once a process has more
    pool threads than the machine has cores, libgomp puts waiting threads to sleep instead of letting them
    spin, which halves the rate of small steps. So what is done once must not leave a pool in the caller.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="gym-sdk-aside")
    thread.start()
    thread.join()
    return future.result()
