"""Worker processes: reuse, faults of every kind, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from gym_sdk.errors import ConfigurationError, DeadlineError
from gym_sdk.processes import PoolConfig, WorkerDiedError, WorkerError, WorkerPool

Make = Callable[..., WorkerPool]

BIG = b"x" * 3_000_000  # more than a socket holds


def gone(*pids: int) -> bool:
    """Wait until none of these processes runs any more; a zombie does not."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not any(runs(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def make() -> Iterator[Make]:
    pools = []

    def make(name: str, **config: Any) -> WorkerPool:
        pool = WorkerPool(f"support.worker_functions:{name}", PoolConfig(**{"workers": 1, **config}))
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pids = pool.pids
        pool.close()
        assert pool.pids == []
        assert gone(*pids)


@pytest.mark.asyncio
async def test_workers_are_reused_and_limited(make: Make) -> None:
    pool = make("pid", workers=2)
    pids = set()

    async def ask() -> None:
        pids.add(await pool.call())

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(ask)
    assert len(pids) <= 2
    assert pids == set(pool.pids)


@pytest.mark.asyncio
async def test_what_is_sent_comes_back(make: Make) -> None:
    pool = make("echo")
    assert await pool.call(1, "é\n", key=[None, 2.5]) == ((1, "é\n"), {"key": [None, 2.5]})
    assert await pool.call(BIG) == ((BIG,), {})
    assert await make("Kit.double").call(4) == 8


@pytest.mark.asyncio
async def test_functions_run_in_the_main_thread(make: Make) -> None:
    assert await make("alarmed").call() == "MainThread"


@pytest.mark.asyncio
async def test_workers_are_replaced_after_so_many_calls(make: Make) -> None:
    pool = make("pid", max_calls_per_worker=2)
    pids = [await pool.call() for _ in range(4)]
    assert pids[0] == pids[1]
    assert pids[2] == pids[3]
    assert len(set(pids)) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "args", "error", "message"),
    [
        ("leave", (7,), WorkerDiedError, "ended with code 7"),
        ("crash", (), WorkerDiedError, "was killed by SIGSEGV"),
        ("fork_and_die", (), WorkerDiedError, "ended with code 5"),
        ("exit_politely", (), WorkerError, "^SystemExit: 3"),
        ("unsendable", (), WorkerError, "it returned a lock, which cannot be sent back: TypeError"),
        ("unreadable", (), WorkerError, "what unreadable returned cannot be read here: 0 and 0"),
        ("fail", ("badly",), ValueError, "^it failed: badly"),
        ("fail", ("picky",), WorkerError, "^PickyError: 1 and 2"),
        ("no_such_function", (), WorkerError, "cannot import .*no_such_function: AttributeError"),
    ],
)
async def test_faults_say_what_happened(
    make: Make, name: str, args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    pool = make(name)
    with pytest.raises(error, match=message):
        await pool.call(*args)
    with pytest.raises(error, match=message):  # and again, in a new worker if need be
        await pool.call(*args)


@pytest.mark.asyncio
async def test_an_error_carries_the_worker_s_traceback(make: Make) -> None:
    with pytest.raises(ValueError, match="it failed") as caught:
        await make("fail").call("x")
    (note,) = caught.value.__notes__
    assert "In the worker process:" in note
    assert "worker_functions.py" in note


@pytest.mark.asyncio
async def test_arguments_that_cannot_be_sent(make: Make) -> None:
    pool = make("echo")
    with pytest.raises(WorkerError, match="the arguments of echo cannot be sent to a process"):
        await pool.call(lambda: 0)
    assert await pool.call(1) == ((1,), {})


@pytest.mark.asyncio
async def test_printing_and_reading_do_no_harm(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    pool = make("noisy")
    assert await pool.call() == "read ''"
    assert await pool.call() == "read ''"
    out, err = capfd.readouterr()
    assert out == ""
    assert "straight to the descriptor" in err


@pytest.mark.asyncio
async def test_a_function_that_forks_answers_once(make: Make) -> None:
    pool = make("fork_and_return")
    children = [await pool.call() for _ in range(3)]
    assert all(child > 0 for child in children)
    assert len(set(children)) == 3


@pytest.mark.asyncio
async def test_memory_is_limited(make: Make) -> None:
    pool = make("allocate", memory_limit=2**30)
    with pytest.raises(MemoryError):
        await pool.call(2**31)
    assert await pool.call(1000) == 1000


@pytest.mark.asyncio
async def test_a_worker_that_died_between_calls_is_replaced(make: Make) -> None:
    pool = make("pid")
    first = await pool.call()
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert await pool.call() != first


@pytest.mark.asyncio
async def test_timeout_and_cancellation_kill_the_worker(make: Make) -> None:
    pool = make("sleep", timeout_s=0.2)
    await pool.call(0)
    (pid,) = pool.pids
    with pytest.raises(DeadlineError, match=r"sleep did not finish within its deadline of 0\.2 s"):
        await pool.call(600)
    assert pool.pids == []
    assert gone(pid)
    pool = make("sleep")
    await pool.call(0)
    (pid,) = pool.pids
    with anyio.move_on_after(0.1) as scope:
        await pool.call(600)
    assert scope.cancelled_caught
    assert pool.pids == []
    assert gone(pid)
    await pool.call(0)


@pytest.mark.asyncio
async def test_closing_wakes_who_waits(make: Make) -> None:
    pool = make("sleep")
    await pool.call(0)

    async def wait() -> None:
        with pytest.raises(WorkerDiedError, match="was stopped"):
            await pool.call(600)

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.sleep(0.05)
        pool.close()
    await pool.call(0)


@pytest.mark.asyncio
async def test_what_a_killed_worker_started_ends_with_it(make: Make, tmp_path: Path) -> None:
    said = tmp_path / "pids"
    pool = make("spawn")
    async with anyio.create_task_group() as group:
        group.start_soon(pool.call, str(said))
        while not said.exists() or not said.read_text():
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    assert gone(*map(int, said.read_text().split()))


def test_a_pool_outlives_event_loops_and_dies_with_its_owner(make: Make) -> None:
    pool = make("pid")
    assert len({asyncio.run(pool.call()) for _ in range(3)}) == 1
    other = WorkerPool("os:getpid", PoolConfig(workers=1))
    pid = asyncio.run(other.call())
    del other
    gc.collect()
    assert gone(pid)


@pytest.mark.parametrize("limit", ["workers", "timeout_s", "max_calls_per_worker", "memory_limit"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{limit} of a function in a process must be positive"):
        PoolConfig(**{limit: 0})


SCRIPT = """
import asyncio, os, sys
open({runs!r}, "a").write("x")  # without a main guard: a worker must not run it again
sys.path.insert(0, {tests!r})
from gym_sdk.processes import PoolConfig, WorkerPool
pool = WorkerPool("support.worker_functions:{name}", PoolConfig(workers=1, timeout_s=500))
print(asyncio.run(pool.call({argument!r})), *pool.pids, flush=True)
"""


def script(tmp_path: Path, name: str, argument: str) -> list[str]:
    path = tmp_path / "script.py"
    tests = str(Path(__file__).parents[1])
    path.write_text(SCRIPT.format(runs=str(tmp_path / "runs"), tests=tests, name=name, argument=argument))
    return [sys.executable, str(path)]


def test_workers_end_with_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        script(tmp_path, "echo", "hi"), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert gone(int(done.stdout.split()[-1]))
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.parametrize("name", ["spawn", "hold_interpreter"])
def test_no_process_is_left_when_this_one_is_killed(tmp_path: Path, name: str) -> None:
    said = tmp_path / "pids"
    with subprocess.Popen(script(tmp_path, name, str(said))) as process:
        try:
            while not said.exists() or not said.read_text():
                assert process.poll() is None
                time.sleep(0.01)
            pids = [int(pid) for pid in said.read_text().split()]
            assert all(map(runs, pids))
        finally:
            process.kill()
    assert gone(*pids)
