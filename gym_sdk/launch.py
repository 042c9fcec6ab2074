"""A policy server in its own process, for as long as a context lasts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path

import anyio
import anyio.to_thread

from gym_sdk.errors import DeadlineError, TransportError

__all__ = ["launch_server"]

_LOG_TAIL = 2_000


@asynccontextmanager
async def launch_server(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    arguments: Sequence[str] = (),
    log: str | Path | None = None,
    start_s: float = 120.0,
    stop_s: float = 20.0,
) -> AsyncIterator[str]:
    """Run `gym-sdk serve MODEL` on a free port until the context is left; yield its base URL.

    The server is a process of its own, so that its work does not stall this event loop. It is told to stop
    when the context is left, killed if it does not, and stops by itself if this process dies.

    Args:
        model: folder of the model.
        host: address to listen on.
        arguments: further arguments of `gym-sdk serve`.
        log: file for the server's output; this process's standard error by default.
        start_s: deadline for the server to listen.
        stop_s: deadline for it to stop after SIGTERM.

    Raises:
        TransportError: the server ended before it listened; the message holds the end of its log.
        DeadlineError: it did not listen in time.
    """
    command = [sys.executable, "-m", "gym_sdk.cli", "serve", str(model), "--host", host, "--port", "0"]
    # Not in a thread: a task cancelled while it waits for one would lose the process that the thread started.
    process, ready, alive = _spawn([*command, *arguments], log)
    try:
        port = await _read_port(ready, start_s, process, log)
        yield f"http://{host}:{port}/v1"
    finally:
        os.close(alive)
        os.close(ready)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_stop, process, stop_s)


def _spawn(command: list[str], log: str | Path | None) -> tuple[subprocess.Popen[bytes], int, int]:
    """Start the server; return it, the pipe that tells its port, and the pipe that keeps it alive."""
    ready, child_ready = os.pipe()
    child_alive, alive = os.pipe()
    try:
        with Path(log).open("ab") if log is not None else nullcontext() as output:
            process = subprocess.Popen(
                [*command, "--ready-fd", str(child_ready), "--alive-fd", str(child_alive)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                pass_fds=(child_ready, child_alive),
                # Ctrl-C goes to this process alone, which then stops the server.
                start_new_session=True,
            )
    except BaseException:
        os.close(ready)
        os.close(alive)
        raise
    finally:
        os.close(child_ready)
        os.close(child_alive)
    return process, ready, alive


async def _read_port(
    ready: int, start_s: float, process: subprocess.Popen[bytes], log: str | Path | None
) -> int:
    line = b""
    with anyio.move_on_after(start_s) as scope:
        while not line.endswith(b"\n"):
            await anyio.wait_readable(ready)
            data = os.read(ready, 64)
            if not data:
                break
            line += data
    if scope.cancelled_caught:
        raise DeadlineError("the server's start", seconds=start_s)
    if line.endswith(b"\n"):
        return int(line)
    code = await anyio.to_thread.run_sync(process.wait, start_s)
    raise TransportError(
        f"the server ended with status {code} before it listened{_log_tail(log)}", retryable=False
    )


def _log_tail(log: str | Path | None) -> str:
    if log is None:
        return "; its output says why"
    text = Path(log).read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
    return f"; the end of {log}:\n{text}"


def _stop(process: subprocess.Popen[bytes], stop_s: float) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(stop_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
