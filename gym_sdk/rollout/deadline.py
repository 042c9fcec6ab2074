"""Bounds on what is awaited, cheap enough for every call of every rollout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import anyio

from gym_sdk.deadline import Deadline
from gym_sdk.errors import DeadlineError

__all__ = ["to_its_end", "until_ended", "was_cancelled", "within"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


async def within(what: str, seconds: float, work: Awaitable[_T]) -> _T:
    """Await work; cancel it after this many seconds, and again every 5 s if it goes on.

    Raises:
        DeadlineError: it did not finish in time.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    with Deadline(seconds) as deadline:
        result = await work
    if deadline.expired or loop.time() > ends:  # later: the work swallowed its cancellation
        raise DeadlineError(what, seconds=seconds)
    return result


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that must not be cut short; a cancellation that comes meanwhile is passed on after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # a scope around it would cancel this in each turn of the loop
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


async def until_ended(running: Callable[[], set[asyncio.Task[None]]], waits_s: Sequence[float]) -> None:
    """Wait for tasks that were cancelled; those that go on are cancelled again, and in the end left alone.

    A cancellation that comes meanwhile is passed on after it.

    Args:
        running: returns the tasks that have not ended.
        waits_s: how long to wait before each further cancellation, in seconds.
    """
    loop = asyncio.get_running_loop()
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        for wait_s in waits_s:
            ends = loop.time() + wait_s
            while (left := running()) and (left_s := ends - loop.time()) > 0:
                try:
                    await asyncio.wait(left, timeout=left_s)
                except asyncio.CancelledError as error:
                    cancelled = error  # whoever leaves waits for the end of what it started
            for task in left:
                _log.warning(
                    "%s was cancelled %g s ago and goes on: something in it swallows the cancellation; it is "
                    "cancelled again",
                    task.get_name(),
                    wait_s,
                )
                task.cancel()
    if cancelled is not None:
        raise cancelled


def was_cancelled() -> bool:
    """Whether somebody cancelled the current task: code in it may also raise `CancelledError` by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
