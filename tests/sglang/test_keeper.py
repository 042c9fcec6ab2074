"""The launching of a process, without SGLang."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from backends.sglang import SGLangProcess, keeper, launch, launch_sglang
from backends.sglang import process as process_module
from gym_sdk.errors import ConfigurationError, DeadlineError, TransportError

pytestmark = pytest.mark.timeout(60)

FAMILY = textwrap.dedent(
    """
    import subprocess, sys, time, signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    # one that has left the process group, and its parent, too
    leave = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
    subprocess.Popen([sys.executable, "-c", leave])
    subprocess.Popen(sleep)
    time.sleep(600)
    """
)


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended, and that nobody has asked about, does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("end", ["parent", "keeper killed", "told"])
def test_no_process_is_left_however_it_ends(end: str) -> None:
    # the parent holds the keeper's pipe, as the process does that launches SGLang
    program = textwrap.dedent(
        f"""
        import os, subprocess, sys, time
        alive, mine = os.pipe()
        keep = [sys.executable, "-I", "-S", {keeper.__file__!r}, str(alive), "0.2"]
        process = subprocess.Popen([*keep, sys.executable, "-c", {FAMILY!r}], pass_fds=(alive,))
        print(process.pid, flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family: list[psutil.Process] = []
    try:
        lines = [parent.stdout.readline().strip() for _ in range(3)]
        (pid,) = (int(line) for line in lines if line != "up")
        process = psutil.Process(pid)
        until = time.monotonic() + 10
        while len(family) != 4 and time.monotonic() < until:  # the one that leaves takes its time to end
            family = [one for one in (process, *process.children(recursive=True)) if lives(one)]
        assert len(family) == 4
        expected = family
        if end == "parent":
            parent.kill()
        elif end == "told":
            process.terminate()
        else:
            process.kill()
            expected = family[:2]  # SGLang's own children look after themselves
        until = time.monotonic() + 20
        while any(map(lives, expected)) and time.monotonic() < until:
            time.sleep(0.02)
        assert not [one for one in expected if lives(one)]
    finally:
        for one in [psutil.Process(parent.pid), *family]:
            if one.is_running():
                one.kill()
        parent.wait()
        parent.stdout.close()


def test_the_keeper_ends_as_its_command_does() -> None:
    for command, status in (("raise SystemExit(3)", 3), ("import os; os.abort()", 128 + signal.SIGABRT)):
        keep = [sys.executable, "-I", "-S", keeper.__file__, "0", "1", sys.executable, "-c", command]
        with subprocess.Popen(keep, stdin=subprocess.PIPE) as process:
            assert process.wait(30) == status


@pytest.mark.asyncio
async def test_a_start_that_fails_shows_the_log(untrained_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"No module named .?sglang") as caught:
        async with launch_sglang(untrained_policy, python=sys.executable, log=tmp_path / "log"):
            pass
    assert not caught.value.retryable
    assert "status 1" in str(caught.value)


@pytest.mark.asyncio
async def test_a_start_has_a_deadline(untrained_policy: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho thinking\nexec sleep 600\n")
    python.chmod(0o755)
    with pytest.raises(DeadlineError, match="thinking"):
        async with launch_sglang(untrained_policy, python=python, start_s=0.5):
            pass


@pytest.mark.asyncio
async def test_a_question_that_is_never_answered_is_asked_again(
    untrained_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "server.py"
    server.write_text(
        textwrap.dedent(
            """
            import socket, sys
            listening = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
            lost, _ = listening.accept()
            status = "503 Starting"
            while True:
                connection, _ = listening.accept()
                connection.recv(4096)
                connection.sendall(f"HTTP/1.1 {status}\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
                print(f'INFO: "GET /health HTTP/1.1" {status}', flush=True)
                connection.close()
                status = "200 OK"
            """
        )
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho first\nexec {sys.executable} {server} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(launch, "_ANSWER_S", 0.3)
    async with launch_sglang(untrained_policy, python=python, start_s=20) as process:
        assert process.diagnosis() is None
        psutil.Process(process._keeper.pid).children()[0].kill()
        assert await process.wait() == 128 + signal.SIGKILL
        told = process.diagnosis()
        assert told is not None
        assert told.endswith("first")  # what it was asked for again and again hides nothing


@pytest.mark.asyncio
async def test_what_cannot_start_is_refused_at_once(untrained_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Python"):
        async with launch_sglang(untrained_policy, python=tmp_path / "python"):
            pass
    with pytest.raises(ConfigurationError, match="no model folder"):
        async with launch_sglang(tmp_path / "model"):
            pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigurationError, match="cannot listen"):
            async with launch_sglang(untrained_policy, port=taken.getsockname()[1]):
                pass


@pytest.fixture
def answering(tmp_path: Path) -> Path:
    """An interpreter that, whatever it is told to run, answers that it is well."""
    server = tmp_path / "server.py"
    server.write_text(
        textwrap.dedent(
            """
            import socket, sys
            listening = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
            print("listening", flush=True)
            while True:
                connection, _ = listening.accept()
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
                connection.close()
            """
        )
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {server} "$@"\n')
    python.chmod(0o755)
    return python


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def kill_command(process: SGLangProcess) -> None:
    psutil.Process(process._keeper.pid).children()[0].kill()


@pytest.mark.asyncio
async def test_what_ends_is_started_again_and_given_up_in_the_end(
    untrained_policy: Path, answering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_PAUSE_S", 0.05)
    log = tmp_path / "log"
    async with launch_sglang(untrained_policy, python=answering, log=log, restarts=2) as process:
        for count in (1, 2):
            kill_command(process)
            await process.wait()
            assert not process.gone
            told = process.diagnosis()
            assert told is not None
            assert "status 137; it is being started again" in told
            await until(lambda count=count: process.restarts == count)  # type: ignore[misc]
            await until(lambda count=count: log.read_text().count("listening") == count + 1)  # type: ignore[misc]
            async with aiohttp.ClientSession() as session, session.get(process.url) as answer:
                assert answer.status == 200  # at the same address
        kill_command(process)
        await until(lambda: process.gone)
        assert process.restarts == 2
        assert "started again" not in (process.diagnosis() or "")


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["running", "between"])
async def test_nothing_is_left_of_what_is_started_again(
    untrained_policy: Path, answering: Path, tmp_path: Path, moment: str
) -> None:
    before = set(psutil.Process().children(recursive=True))
    async with launch_sglang(untrained_policy, python=answering, log=tmp_path / "log", restarts=2) as process:
        if moment == "between":
            kill_command(process)
            await process.wait()
        else:
            assert set(psutil.Process().children(recursive=True)) - before
    assert process.exit_status is not None
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=10)
    assert not alive
