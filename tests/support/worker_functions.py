"""Functions that tests run in worker processes: they have to be importable by name."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gym_sdk.processes import in_process
from gym_sdk.schema import Rollout
from gym_sdk.tools import ToolContext, tool


def pid() -> int:
    return os.getpid()


def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def leave(code: int) -> None:
    os._exit(code)


def exit_politely() -> None:
    sys.exit(3)


def crash() -> None:
    ctypes.string_at(0)


def noisy() -> str:
    print("\x00" * 100_000)  # noqa: T201
    os.write(1, b"straight to the descriptor\n")
    return f"read {sys.stdin.read()!r}"


def unsendable() -> Any:
    return threading.Lock()


class PickyError(Exception):
    """Can be pickled, but not made again."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class Unreadable:
    """Can be pickled, but made again only in the process that made it."""

    def __init__(self) -> None:
        self.home = os.getpid()

    def __reduce__(self) -> Any:
        return _only_in, (self.home,)


def _only_in(home: int) -> Unreadable:
    if os.getpid() != home:
        raise PickyError(0, 0)
    return Unreadable()


def unreadable() -> Any:
    return Unreadable()


def fail(how: str) -> None:
    if how == "picky":
        raise PickyError(1, 2)
    raise ValueError(f"it failed: {how}")


def fork_and_return() -> int:
    """Both processes return."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return child


def fork_and_die() -> None:
    """The child outlives this process and would hold its pipes."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(5)


def spawn(path: str) -> None:
    """Start a process that never ends, say its id and this one's, then hang."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(f"{other.pid} {os.getpid()}")
    time.sleep(600)


def hold_interpreter(path: str) -> None:
    """Say this process's id, then keep the interpreter's lock in C code for minutes."""
    Path(path).write_text(f"{os.getpid()} {os.getpid()}")
    _ = 7 ** (7**11)


def allocate(size: int) -> int:
    return len(bytearray(size))


def alarmed() -> str:
    """Needs the main thread."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    return threading.current_thread().name


class Kit:
    @staticmethod
    def double(n: int) -> int:
        return 2 * n


@tool
@in_process(workers=1)
def add(a: int, b: int = 10) -> str:
    """Add.

    Args:
        a: the first number.
    """
    if a == 13:
        os._exit(1)
    return f"{a + b} in {os.getpid()}"


@tool
@in_process(workers=1)
def who(context: ToolContext, suffix: str = "") -> str:
    assert context.task is not None
    return f"{context.task.input}{suffix}"


@in_process(workers=1, timeout_s=5.0)
def is_right(rollout: Rollout) -> float:
    if rollout.output_text == "hang":
        time.sleep(600)
    if rollout.output_text == "nonsense":
        return "good"  # type: ignore[return-value]
    return float(rollout.output_text == rollout.task.answer)
