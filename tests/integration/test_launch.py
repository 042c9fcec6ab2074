"""The server in a process of its own: start, drain, stop, crash, and a parent that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import psutil
import pytest

from gym_sdk import GymClient
from gym_sdk.errors import DeadlineError, TransportError
from gym_sdk.launch import launch_server

pytestmark = pytest.mark.asyncio


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "gym_sdk.cli" in " ".join(child.cmdline())]


async def test_it_serves_while_the_context_lasts(untrained_policy: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    async with launch_server(untrained_policy, arguments=["--name", "tiny"], log=log) as url:
        (server,) = children()
        async with GymClient(url, model="tiny") as client:
            response = await client.respond("hello", max_output_tokens=4)
            assert response.tokens is not None
            # a request in flight is finished, not cut, when the server is told to stop
            slow = asyncio.create_task(client.respond("hello", max_output_tokens=600))
            await asyncio.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            assert (await slow).tokens is not None
    assert not server.is_running()
    assert "Traceback" not in log.read_text()


async def test_a_model_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="no/such/model"):
        async with launch_server(tmp_path / "no/such/model", log=tmp_path / "server.log"):
            pass
    assert children() == []


async def test_a_start_that_takes_too_long_is_ended(untrained_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match="the server's start"):
        async with launch_server(untrained_policy, log=tmp_path / "server.log", start_s=0.05):
            pass
    assert children() == []


async def test_cancelling_the_start_leaves_nothing(untrained_policy: Path, tmp_path: Path) -> None:
    with anyio.move_on_after(0.3):
        async with launch_server(untrained_policy, log=tmp_path / "server.log"):
            pass
    assert children() == []


async def test_asyncios_own_cancellation_of_the_start_leaves_nothing(
    untrained_policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), launch_server(untrained_policy, log=tmp_path / "server.log"):
            pass
    assert children() == []


PARENT = """
import asyncio, signal, sys
from gym_sdk.launch import launch_server

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored

async def main():
    async with launch_server(sys.argv[1], log=sys.argv[2]) as url:
        print(url, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_the_server_does_not_outlive_its_parent(
    untrained_policy: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", PARENT, str(untrained_policy), str(tmp_path / "server.log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    try:
        url = (await asyncio.to_thread(parent.stdout.readline)).decode()
        assert url.startswith("http://127.0.0.1:")
        (server,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, number)
        await asyncio.to_thread(parent.wait, 30)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 30
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
