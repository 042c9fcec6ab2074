"""What runs in a worker process: one function, called once for each request. Standard library only.

The parent starts this file as a script. File descriptor 0 is a pipe on which nothing is ever written: when
the parent is gone, its end closes, and this process ends with all its children. Requests and replies are
pickles, each after its length (8 bytes, big-endian), on a socket of their own: a function may read and print.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["HEADER", "MARK", "main", "resolve"]

HEADER = struct.Struct(">Q")
MARK = "__gym_sdk_in_process__"
"""Attribute of what `in_process` returns: the pool, whose `function` is the one to call."""


def resolve(target: str) -> Callable[..., Any]:
    """Find the function that `module:qualname` names, under the tool and the pool that it may have become.

    Raises:
        Exception: whatever importing the module raises, or `AttributeError`.
    """
    module, _, qualname = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    layer = found
    while layer is not None:
        pool = getattr(layer, MARK, None)
        if pool is not None:
            function: Callable[..., Any] = pool.function
            return function
        layer = getattr(layer, "__wrapped__", None)
    return found  # type: ignore[no-any-return]


def main() -> None:
    """Answer requests until the parent closes its end."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    _end_with_parent()
    _seal_off(channel)
    hello = pickle.loads(_receive(channel))
    try:
        if hello["memory_limit"] is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (hello["memory_limit"],) * 2)
        sys.path[:] = hello["path"]
        function = resolve(hello["target"])
    except BaseException as error:
        _send(channel, ("failed", _describe(error), traceback.format_exc()))
        return
    _send(channel, ("ready", None, None))
    owner = os.getpid()
    while True:
        reply = _answer(function, _receive(channel))
        if os.getpid() != owner:
            os._exit(0)  # the function forked, and this is the child: its result is nobody's
        channel.sendall(reply)


def _end_with_parent() -> None:
    """Have the whole process group killed as soon as the parent is gone, whatever this process does then."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    if hasattr(fcntl, "F_SETSIG"):
        # The kernel does it: a thread would not get to run while C code holds the interpreter's lock.
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if _is_closed(lifeline, 0):  # it was gone before we asked
            os._exit(1)
    else:
        threading.Thread(target=_is_closed, args=(lifeline, None), daemon=True).start()


def _is_closed(lifeline: int, timeout_ms: int | None) -> bool:
    poll = select.poll()
    poll.register(lifeline, select.POLLHUP)
    closed = bool(poll.poll(timeout_ms))
    if closed and timeout_ms is None:
        os.killpg(0, signal.SIGKILL)
    return closed


def _seal_off(channel: socket.socket) -> None:
    """Send what is printed to stderr, and keep forked children from holding the channel open."""
    os.dup2(2, 1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.register_at_fork(after_in_child=channel.close)


def _answer(function: Callable[..., Any], request: bytes) -> bytes:
    try:
        try:
            args, kwargs = pickle.loads(request)
        except Exception as error:
            return _frame(("unsendable", f"its arguments cannot be read there: {_describe(error)}", None))
        result = function(*args, **kwargs)
        try:
            return _frame(("returned", result, None))
        except Exception as error:
            text = f"it returned a {type(result).__name__}, which cannot be sent back: {_describe(error)}"
            return _frame(("unsendable", text, None))
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> bytes:
    text = traceback.format_exc()
    # an error that is not an Exception (`sys.exit()`) is this process's own affair
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):
            frame = _frame(("raised", error, text))
            pickle.loads(frame[HEADER.size :])  # some errors can be pickled, but not made again
            return frame
    return _frame(("broke", _describe(error), text))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _frame(reply: tuple[str, Any, str | None]) -> bytes:
    data = pickle.dumps(reply, protocol=5)
    return HEADER.pack(len(data)) + data


def _send(channel: socket.socket, reply: tuple[str, Any, str | None]) -> None:
    channel.sendall(_frame(reply))


def _receive(channel: socket.socket) -> bytes:
    return bytes(_receive_exactly(channel, HEADER.unpack(_receive_exactly(channel, HEADER.size))[0]))


def _receive_exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    got = 0
    while got < size:
        count = channel.recv_into(view[got:])
        if not count:
            os._exit(0)
        got += count
    return data


if __name__ == "__main__":
    main()
