"""One worker process, seen from the parent."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gym_sdk.errors import GymError
from gym_sdk.processes import child

__all__ = ["Worker", "WorkerDiedError", "WorkerError"]

_EXIT_WAIT_S = 1.0
_CLOSE_WAIT_S = 5.0


class WorkerError(GymError, RuntimeError):
    """A function in a worker process gave no result that could be brought back."""


class WorkerDiedError(WorkerError):
    """A worker process ended without an answer."""


class Worker:
    """A process that runs `child.py`: a session of its own, so that all its descendants end with it.

    Its socket belongs to no event loop; whichever waits for an answer watches it for as long. All methods
    belong to one thread at a time.

    Attributes:
        pid: of the process, of its group and of its session.
        calls: how many calls it has answered.
    """

    def __init__(self) -> None:
        """Start the process.

        Raises:
            WorkerDiedError: the machine starts no further process.
        """
        self._socket, theirs = socket.socketpair()
        try:
            # -P: the script's folder is not on the path; `greet` sends the path that this process has
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(child.__file__)), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            self._socket.close()
            raise WorkerDiedError(f"no worker process could be started: {error}") from error
        finally:
            theirs.close()
        self._socket.setblocking(False)
        self._busy = False
        self._ended = False
        self.pid = self._process.pid
        self.calls = 0

    @property
    def running(self) -> bool:
        """Whether the process can still answer."""
        return not self._ended and self._exit() is None

    async def greet(self, target: str, memory_limit: int | None) -> None:
        """Have the process import its function.

        Args:
            target: `module:qualname` of the function.
            memory_limit: most address space of the process, in bytes.

        Raises:
            WorkerError: the import failed; says how.
            WorkerDiedError: the process ended instead.
        """
        path = [entry or str(Path.cwd()) for entry in sys.path]
        hello = {"path": path, "target": target, "memory_limit": memory_limit}
        kind, value, trace = pickle.loads(await self.ask(pickle.dumps(hello, protocol=5)))
        if kind != "ready":
            error = WorkerError(f"a worker process cannot import {target}: {value}")
            error.add_note(f"In the worker process:\n{trace}")
            raise error

    async def ask(self, request: bytes) -> bytearray:
        """Send a request and wait for its reply. A worker whose `ask` did not return is of no more use.

        Raises:
            WorkerDiedError: the process ended instead.
        """
        loop = asyncio.get_running_loop()
        self._busy = True
        try:
            await self._or_died(loop.sock_sendall(self._socket, child.HEADER.pack(len(request)) + request))
            (size,) = child.HEADER.unpack(await self._receive(loop, child.HEADER.size))
            return await self._receive(loop, size)
        finally:
            self._busy = False
            if self._ended:
                self._socket.close()

    def kill(self, *, wait: bool = False) -> None:
        """End the process and all that it started. May be called twice.

        Args:
            wait: return when the process is gone; otherwise a thread waits for that.
        """
        if self._ended:
            return
        self._ended = True
        if self._busy:  # wakes who waits for the answer; the event loop still watches the descriptor
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._socket.close()
        # Nobody has waited for the process yet, so its id, which is its group's, is still its own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if wait:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_WAIT_S)
        else:
            threading.Thread(target=self._process.wait, name="gym-sdk reaper", daemon=True).start()
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _receive(self, loop: asyncio.AbstractEventLoop, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        got = 0
        while got < size:
            count = await self._or_died(loop.sock_recv_into(self._socket, view[got:]))
            if not count:
                raise WorkerDiedError(await self._how_it_ended())
            got += count
        return data

    async def _or_died(self, operation: Awaitable[Any]) -> Any:
        try:
            return await operation
        except OSError:  # it does not read any more
            raise WorkerDiedError(await self._how_it_ended()) from None

    async def _how_it_ended(self) -> str:
        """Say how the process ended. Its socket closes a moment before it is gone."""
        if self._ended:
            return "the worker process was stopped"
        loop = asyncio.get_running_loop()
        until = loop.time() + _EXIT_WAIT_S
        while (ended := self._exit()) is None:
            if loop.time() > until:
                return "the worker process closed its connection"
            await asyncio.sleep(0.005)
        if ended.si_code == os.CLD_EXITED:
            return f"the worker process ended with code {ended.si_status}"
        name = signal.Signals(ended.si_status).name
        cause = ": was memory short?" if name == "SIGKILL" else ""
        return f"the worker process was killed by {name}{cause}"

    def _exit(self) -> Any:
        """How the process ended, without waiting for it: as long as nobody has, its id is not used again."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody else waited for it
            return os.waitid_result((self.pid, 0, signal.SIGCHLD, 0, os.CLD_EXITED))
