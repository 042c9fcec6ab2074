"""`in_process`: declares that a function runs in processes of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, overload

from gym_sdk.calling import is_async
from gym_sdk.errors import ConfigurationError
from gym_sdk.processes.child import MARK, resolve
from gym_sdk.processes.pool import PoolConfig, WorkerPool

__all__ = ["in_process", "pool_of"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def in_process(
    function: Callable[P, R],
    /,
    *,
    workers: int | None = None,
    timeout_s: float = 60.0,
    max_calls_per_worker: int | None = None,
    memory_limit: int | None = None,
) -> Callable[P, Coroutine[Any, Any, R]]: ...


@overload
def in_process(
    *,
    workers: int | None = None,
    timeout_s: float = 60.0,
    max_calls_per_worker: int | None = None,
    memory_limit: int | None = None,
) -> Callable[[Callable[P, R]], Callable[P, Coroutine[Any, Any, R]]]: ...


def in_process(
    function: Callable[..., Any] | None = None,
    /,
    *,
    workers: int | None = None,
    timeout_s: float = 60.0,
    max_calls_per_worker: int | None = None,
    memory_limit: int | None = None,
) -> Callable[..., Any]:
    """Make a coroutine function that calls a plain function in a worker process.

    For code that needs the main thread (SIGALRM), holds the interpreter's lock, crashes, leaks, or cannot be
    trusted to end. As a decorator below `@tool`, or around a verifier: `verifier=in_process(check)`.

    The worker imports the function's module and calls it in its main thread; arguments and result are
    pickled. What it prints goes to stderr. A worker that dies or runs out of time fails that one call, and
    is killed with all that it started; the next call gets a new one. `pool_of(...)` gives the processes.

    Args:
        function: a function at the top level of a module, or of a class in it.
        workers: processes at most; by default one for each core, up to 4.
        timeout_s: deadline of one call in seconds, waiting for a free worker not counted.
        max_calls_per_worker: replaces a worker after so many calls.
        memory_limit: most address space of a worker, in bytes.

    Raises:
        ConfigurationError: a worker could not import the function (a lambda, a local function, one of a
            notebook or a script), it is a coroutine function, or a limit is not positive.
    """
    config = PoolConfig(workers, timeout_s, max_calls_per_worker, memory_limit)

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        pool = WorkerPool(_target(function), config, function=function)
        checked = False

        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal checked
            if not checked:
                _check_name(function)
                checked = True
            return await pool.call(*args, **kwargs)

        setattr(call, MARK, pool)
        return call

    return declare if function is None else declare(function)


def pool_of(function: Callable[..., Any]) -> WorkerPool:
    """Return the processes of a function, or of a tool, that was declared with `in_process`.

    Raises:
        ConfigurationError: it was not.
    """
    layer: Any = function
    while layer is not None:
        pool = getattr(layer, MARK, None)
        if isinstance(pool, WorkerPool):
            return pool
        layer = getattr(layer, "__wrapped__", None)
    raise ConfigurationError(f"{function!r:.100} does not run in processes: declare it with in_process")


def _target(function: Callable[..., Any]) -> str:
    """Name the function so that another process finds it."""
    if is_async(function):
        raise ConfigurationError(
            f"in_process: {function.__qualname__} is a coroutine function, which runs on the event loop; "
            "write a plain `def`"
        )
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not inspect.isroutine(function) or inspect.ismethod(function) or not module or not name:
        raise ConfigurationError(
            f"in_process needs a function at the top level of a module, not {function!r:.100}: a worker "
            "process imports it by name"
        )
    if module == "__main__":
        raise ConfigurationError(
            f"in_process: {name} is defined in a notebook, a script or the interpreter, which a worker "
            "process cannot import; move it into a module (in a notebook: a cell with `%%writefile "
            "my_tools.py`), and import it from there"
        )
    if "<" in name:
        raise ConfigurationError(
            f"in_process: {name} is a lambda or a function inside another one, which a worker process cannot "
            f"import; define it at the top level of {module}"
        )
    return f"{module}:{name}"


def _check_name(function: Callable[..., Any]) -> None:
    """At the first call, when its module is complete: does the name lead to the function?"""
    target = _target(function)
    try:
        found = resolve(target)
    except Exception as error:
        raise ConfigurationError(f"in_process: {target} cannot be imported: {error}") from error
    if found is not function:
        raise ConfigurationError(
            f"in_process: {target} is another function now, so a worker process would call the wrong one; "
            "give each function a name of its own"
        )
