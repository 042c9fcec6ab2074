"""Calling what a user wrote: coroutine functions on the event loop, everything else in a thread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import anyio.to_thread

__all__ = ["call_function", "is_async", "name_of"]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function gives a coroutine: looks through partials and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    called = function if inspect.isroutine(function) else type(function).__call__
    return inspect.iscoroutinefunction(called)


def name_of(function: Callable[..., Any]) -> str:
    """What to call a function in messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", None) or type(function).__name__)


async def call_function(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function so that it cannot stop the event loop.

    A coroutine function runs on the loop, any other in a worker thread, in the caller's context. When the
    caller is cancelled, the thread is left behind: Python cannot stop it, and its result is dropped.

    Raises:
        Exception: whatever the function raises.
    """
    call = functools.partial(function, *args, **kwargs)
    if is_async(function):
        return await call()
    result = await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
    return await result if inspect.isawaitable(result) else result
