"""Calling what a user wrote: coroutine functions on the event loop, everything else in a thread."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from gym_sdk.threads import worker_threads

__all__ = ["call_async", "call_function", "call_in_thread", "is_async", "name_of"]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function gives a coroutine: looks through partials and callable objects."""
    plain = function.__func__ if type(function) is MethodType else function
    if type(plain) is FunctionType and plain.__code__.co_flags & inspect.CO_COROUTINE:
        return True  # nearly all of them, at a tenth of the cost of what follows
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
        ThreadsExhaustedError: too many threads were left behind.
        Exception: whatever the function raises.
    """
    if is_async(function):
        return await call_async(function, *args, **kwargs)
    return await call_in_thread(function, *args, **kwargs)


async def call_async(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a coroutine function.

    Raises:
        RuntimeError: it raised `CancelledError` although nobody cancelled it, for example because it waited
            for a task of its own that it had cancelled. That must not look like the end of the caller.
        Exception: whatever the function raises.
    """
    try:
        return await function(*args, **kwargs)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("it raised CancelledError, but nobody cancelled it") from error


async def call_in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a worker thread; if it gives an awaitable, await that on the loop.

    Raises:
        ThreadsExhaustedError: too many threads were left behind.
        Exception: whatever the function raises.
    """
    result = await worker_threads().run(functools.partial(function, *args, **kwargs), name_of(function))
    return await result if inspect.isawaitable(result) else result
