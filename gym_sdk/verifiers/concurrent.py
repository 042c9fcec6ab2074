"""Calls that belong together: they run at the same time, and end together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

__all__ = ["run_together"]

T = TypeVar("T")


async def run_together(
    calls: Sequence[Callable[[], Awaitable[T]]], *, concurrency: int | None = None
) -> list[T]:
    """Run calls concurrently and return their results in order.

    The first error cancels the others, and is raised as it is, not in an exception group. When this
    returns or raises, none of them runs any more.

    Args:
        calls: functions without arguments.
        concurrency: how many run at once, at most; None for all.

    Raises:
        Exception: the first that a call raised.
    """
    results: dict[int, T] = {}
    errors: list[Exception] = []
    waiting = iter(enumerate(calls))

    async def work() -> None:
        for place, call in waiting:
            try:
                results[place] = await call()
            except Exception as error:
                errors.append(error)
                group.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as group:
        for _ in range(min(len(calls), concurrency or len(calls))):
            group.start_soon(work)
    if errors:
        raise errors[0]
    return [results[place] for place in range(len(calls))]
