"""SGLang in processes of its own, for as long as a context lasts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread

from backends.sglang import keeper
from gym_sdk.errors import ConfigurationError, DeadlineError, TransportError

__all__ = ["CPU_ARGUMENTS", "SGLangProcess", "launch_sglang"]

CPU_ARGUMENTS = (
    *("--device", "cpu", "--dtype", "float32", "--sleep-on-idle", "--skip-server-warmup"),
    *("--max-total-tokens", "65536"),
)
"""What SGLang needs to be told on a machine without a GPU; arguments that come later overrule it.

Its own warm-up compiles nothing there; it is one request, without which SGLang never says that it is ready.
`launch_sglang` waits for a token anyway, and asks again if none comes. Left to itself, SGLang takes most of
the machine's memory for keys and values, which on a CPU takes a minute and leaves nothing to others."""

_LOG_TAIL = 4_000
_LOG_READ = 64_000
_POLL_S = 0.1
_POLLED = '"GET /health HTTP/1.1"'
_ANSWER_S = 30.0
"""How long one question may take; SGLang waits 20 s for a token before it answers that it is not well."""
_KILL_S = 10.0


class SGLangProcess:
    """A running SGLang.

    Attributes:
        url: its root, for `SGLangEngine.connect`.
        log: the file with its output.
    """

    def __init__(self, keeper_process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self._keeper = keeper_process

    @property
    def exit_status(self) -> int | None:
        """How it ended (128 and more: by a signal); None while it runs."""
        return self._keeper.poll()

    def diagnosis(self) -> str | None:
        """Return how it ended and the end of its log; None while it runs."""
        status = self.exit_status
        return None if status is None else f"SGLang ended with status {status}{_log_tail(self.log)}"

    async def wait(self) -> int:
        """Wait until SGLang has ended; return its status."""
        return await anyio.to_thread.run_sync(self._keeper.wait, abandon_on_cancel=True)


@asynccontextmanager
async def launch_sglang(
    model: str | Path,
    *,
    python: str | Path = sys.executable,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    log: str | Path | None = None,
    weight_version: str = "0",
    start_s: float = 600.0,
    stop_s: float = 20.0,
) -> AsyncIterator[SGLangProcess]:
    """Run SGLang until the context is left; yield it when it answers.

    It is told to stop when the context is left and killed if it does not, with all its processes; they also
    go if this process does, SIGKILL included (Linux). A death in between is not repaired: requests then raise
    `TransportError`, with the end of the log if the engine was given `SGLangProcess.diagnosis`.

    Args:
        model: folder of the model.
        python: the interpreter of an environment in which SGLang is installed.
        arguments: further arguments of `sglang.launch_server`, e.g. `CPU_ARGUMENTS`.
        environment: variables to add to this process's own.
        host: address to listen on.
        port: port to listen on; a free one by default.
        log: file for its output; by default one in a temporary folder that goes with the context.
        weight_version: the label of the model's weights.
        start_s: deadline for it to answer.
        stop_s: deadline for it to stop after SIGTERM.

    Raises:
        ConfigurationError: there is no such interpreter or model folder, or the port is in use.
        TransportError: SGLang ended before it answered; the message holds the end of its log.
        DeadlineError: it did not answer in time.
    """
    interpreter = shutil.which(python)
    if interpreter is None:
        raise ConfigurationError(f"there is no Python at {python}; name one that has SGLang installed")
    if not await anyio.Path(model).is_dir():
        raise ConfigurationError(f"there is no model folder {model}")
    port = _free_port(host, port)
    command = [interpreter, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", host, "--port", str(port), "--weight-version", weight_version, *arguments]
    folder = None if log is not None else tempfile.mkdtemp(prefix="gym-sdk-sglang-")
    file = Path(log) if log is not None else Path(str(folder), "sglang.log")
    # Not in a thread: a task cancelled while it waits for one would lose the process that the thread started.
    process, alive = _spawn(command, {**os.environ, **(environment or {})}, file, stop_s)
    try:
        server = SGLangProcess(process, f"http://{host}:{port}", file)
        await _answering(server, start_s)
        yield server
    finally:
        os.close(alive)  # the keeper's sign to stop
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(_reap, process, stop_s)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _free_port(host: str, port: int | None) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise ConfigurationError(f"SGLang cannot listen on {host}:{port}: {error}") from error
        found: int = probe.getsockname()[1]
        return found


def _spawn(
    command: list[str], environment: dict[str, str], log: Path, stop_s: float
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the keeper of the command; return it and the pipe that keeps it alive."""
    child_alive, alive = os.pipe()
    keep = [sys.executable, "-I", "-S", keeper.__file__, str(child_alive), str(stop_s)]
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*keep, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
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


async def _answering(server: SGLangProcess, start_s: float) -> None:
    with anyio.move_on_after(start_s) as scope:
        async with aiohttp.ClientSession(
            # a connection of its own for each question: one that gets lost takes no other with it
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(total=_ANSWER_S),
        ) as session:
            while True:
                if (why := server.diagnosis()) is not None:
                    raise TransportError(f"{why}\n(it ended before it answered)", retryable=False)
                with suppress(aiohttp.ClientError, OSError):
                    async with session.get(f"{server.url}/health") as answer:
                        if answer.status == 200:
                            return
                await anyio.sleep(_POLL_S)
    if scope.cancelled_caught:
        raise DeadlineError(f"SGLang's start{_log_tail(server.log)}\nThis", seconds=start_s)


def _log_tail(log: Path) -> str:
    """Return the end of the log, without this module's own questions."""
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
