"""Runs one command, and lets nothing of it outlive the process that asked for it.

A program of its own (standard library only), started by `backends.sglang.launch`::

    python -I keeper.py ALIVE_FD STOP_S command ...

It ends the command and all that descends from it when ALIVE_FD reaches its end of file, which it does however
the process at the other end goes away, or when it is told to by SIGTERM or SIGINT. Then, or when the command
has ended by itself, it exits with the command's status.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LAST_S = 5.0


def main(arguments: list[str]) -> int:
    """Run the command until it ends, or must."""
    alive, stop_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    libc = ctypes.CDLL(None)
    # orphans of the command become children of this process, so that it finds and ends them
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(
        command,
        start_new_session=True,
        # should this process be killed itself, the command goes, too
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    while process.poll() is None:
        readable, _, _ = select.select([alive, told], [], [])
        numbers = os.read(told, 64) if told in readable else b""
        if alive in readable or signal.SIGTERM in numbers or signal.SIGINT in numbers:
            _stop(process, stop_s)
    _end_descendants()
    code = process.returncode
    return code if code >= 0 else 128 - code


def _stop(process: subprocess.Popen[bytes], stop_s: float) -> None:
    """Ask for the end, then enforce it."""
    process.terminate()
    try:
        process.wait(stop_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_descendants() -> None:
    until = time.monotonic() + _LAST_S
    while (children := _children()) and time.monotonic() < until:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _children() -> list[int]:
    """Return the processes whose parent is this one; those of the killed become so, too."""
    mine = os.getpid()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == mine and state != "Z":
                    found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
