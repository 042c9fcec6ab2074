"""SGLang's process: its keeper, its end, and starting it again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from backends.sglang import keeper

__all__ = ["SGLangProcess", "log_tail"]

logger = logging.getLogger(__name__)

_LOG_TAIL = 4_000
_LOG_READ = 64_000
_POLLED = '"GET /health HTTP/1.1"'
_POLL_S = 0.1
_KILL_S = 10.0
_CALM_S = 600.0
"""After so long, an end has nothing to do with the one before."""
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


class SGLangProcess:
    """A running SGLang.

    Attributes:
        url: its root, for `SGLangEngine.connect`; the same after it was started again.
        log: the file with its output.
        restarts: how often it was started again.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, url: str, log: Path, stop_s: float
    ) -> None:
        self.url = url
        self.log = log
        self.restarts = 0
        self._command = list(command)
        self._environment = dict(environment)
        self._stop_s = stop_s
        self._keeping: asyncio.Task[None] | None = None
        self._keeper, alive = self._spawn()
        self._alive: int | None = alive

    @property
    def exit_status(self) -> int | None:
        """How it ended (128 and more: by a signal); None while it runs."""
        return self._keeper.poll()

    @property
    def gone(self) -> bool:
        """Whether it has ended and will not be started again."""
        return self.exit_status is not None and (self._keeping is None or self._keeping.done())

    def diagnosis(self) -> str | None:
        """Return how it ended and the end of its log; None while it runs."""
        status = self.exit_status
        if status is None:
            return None
        more = "" if self.gone else "; it is being started again"
        return f"SGLang ended with status {status}{more}{log_tail(self.log)}"

    async def wait(self) -> int:
        """Wait until SGLang has ended; return its status."""
        while (status := self.exit_status) is None:  # noqa: ASYNC110 - only asking tells
            await anyio.sleep(_POLL_S)
        return status

    def keep_running(self, times: int) -> None:
        """From now on, start it again when it ends by itself, at most so many times in a row."""
        self._keeping = asyncio.create_task(self._keep_running(times))

    async def stop(self) -> None:
        """Tell it to stop, and enforce it after `stop_s`; returns when all its processes are gone."""
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
        await self._end()

    async def _keep_running(self, times: int) -> None:
        in_a_row = 0
        while True:
            since = asyncio.get_running_loop().time()
            status = await self.wait()
            if asyncio.get_running_loop().time() - since > _CALM_S:
                in_a_row = 0
            if in_a_row == times:
                logger.error("SGLang ended with status %d once more, and is given up", status)
                return
            in_a_row += 1
            logger.warning(
                "SGLang ended with status %d; starting it again (%d of %d in a row)", status, in_a_row, times
            )
            await asyncio.sleep(min(_PAUSE_S * 2.0 ** (in_a_row - 1), _LONGEST_PAUSE_S))
            await self._end()
            self._keeper, self._alive = self._spawn()
            self.restarts += 1

    async def _end(self) -> None:
        if self._alive is not None:
            os.close(self._alive)  # the keeper's sign to stop
            self._alive = None
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_reap, self._keeper, self._stop_s)

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """Start the keeper of the command; return it and the pipe that keeps it alive."""
        # Not in a thread: a task cancelled while it waits for one would lose the process that it started.
        child_alive, alive = os.pipe()
        keep = [sys.executable, "-I", "-S", keeper.__file__, str(child_alive), str(self._stop_s)]
        try:
            with self.log.open("ab") as output:
                process = subprocess.Popen(
                    [*keep, *self._command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(child_alive,),
                    # Ctrl-C goes to this process alone, which then stops SGLang.
                    start_new_session=True,
                )
        except BaseException:
            os.close(alive)
            raise
        finally:
            os.close(child_alive)
        return process, alive


def log_tail(log: Path) -> str:
    """Return the end of the log, without the questions whether it is well."""
    with suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LOG_READ))
        lines = stream.read().decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if _POLLED not in line)
        return f"; the end of {log}:\n{text[-_LOG_TAIL:].strip()}"
    return ""


def _reap(process: subprocess.Popen[bytes], stop_s: float) -> None:
    try:
        process.wait(stop_s + _KILL_S)
    except subprocess.TimeoutExpired:
        # SGLang's main process goes with its keeper, and its children with it
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
