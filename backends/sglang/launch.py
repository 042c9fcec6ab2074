"""Starting SGLang, for as long as a context lasts."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import anyio

from backends.sglang.process import SGLangProcess, log_tail
from backends.sglang.request import GRAMMAR_BACKEND
from gym_sdk.errors import ConfigurationError, DeadlineError, TransportError

__all__ = ["CPU_ARGUMENTS", "launch_sglang"]

CPU_ARGUMENTS = (
    *("--device", "cpu", "--dtype", "float32", "--sleep-on-idle", "--skip-server-warmup"),
    *("--max-total-tokens", "65536"),
)
"""What SGLang needs to be told on a machine without a GPU; arguments that come later overrule it.

Its own warm-up compiles nothing there; it is one request, without which SGLang never says that it is ready.
`launch_sglang` waits for a token anyway, and asks again if none comes. Left to itself, SGLang takes most of
the machine's memory for keys and values, which on a CPU takes a minute and leaves nothing to others."""

_ENVIRONMENT = {"SGLANG_TIMEOUT_KEEP_ALIVE": "600"}
"""SGLang closes connections that are idle for 5 s; a request that meets the close is lost."""
_POLL_S = 0.1
_ANSWER_S = 30.0
"""How long one question may take; SGLang waits 20 s for a token before it answers that it is not well."""


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
    restarts: int = 0,
) -> AsyncIterator[SGLangProcess]:
    """Run SGLang until the context is left; yield it when it answers.

    It is told to stop when the context is left and killed if it does not, with all its processes; they also
    go if this process does, SIGKILL included (Linux). If it ends in between, it is started again as often as
    `restarts` says, on the same port and with the weights of the model folder. An engine's requests then
    raise `TransportError`, with the end of the log if it was given `SGLangProcess.diagnosis`.

    Args:
        model: folder of the model.
        python: the interpreter of an environment in which SGLang is installed.
        arguments: further arguments of `sglang.launch_server`, e.g. `CPU_ARGUMENTS`; they overrule ours.
        environment: variables to add to this process's own.
        host: address to listen on.
        port: port to listen on; a free one by default.
        log: file for its output; by default one in a temporary folder that goes with the context.
        weight_version: the label of the model's weights.
        start_s: deadline for it to answer.
        stop_s: deadline for it to stop after SIGTERM.
        restarts: how often in a row to start it again when it ends by itself after it had answered.

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
    command += ["--host", host, "--port", str(port), "--weight-version", weight_version]
    command += ["--grammar-backend", GRAMMAR_BACKEND, *arguments]
    folder = None if log is not None else tempfile.mkdtemp(prefix="gym-sdk-sglang-")
    file = Path(log) if log is not None else Path(str(folder), "sglang.log")
    process = SGLangProcess(
        command,
        {**_ENVIRONMENT, **os.environ, **(environment or {})},
        url=f"http://{host}:{port}",
        log=file,
        stop_s=stop_s,
    )
    try:
        await _answering(process, start_s)
        if restarts:
            process.keep_running(restarts)
        yield process
    finally:
        await process.stop()
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
        raise DeadlineError(f"SGLang's start{log_tail(server.log)}\nThis", seconds=start_s)
