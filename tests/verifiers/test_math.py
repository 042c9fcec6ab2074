from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers import Verifier, math_equivalent, run_verifier
from gym_sdk.verifiers.process import WorkerDiedError, WorkerPool

Make = Callable[..., Rollout]

ECHO = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        os._exit(7)
    time.sleep(request.get("sleep", 0))
    print(json.dumps({**request, "pid": os.getpid()}), flush=True)
"""


@pytest.fixture(scope="module")
def equivalent() -> Verifier:
    return math_equivalent(workers=1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 0.5", "1/2", 1.0),
        ("So we get $\\frac{2}{4}$.", "\\frac{1}{2}", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{2x}", "2x+1", 0.0),
        ("\\boxed{x+1}", "$x+1$", 1.0),
        ("\\boxed{12}", 12, 1.0),
        ("I think 12 or 13", "12", 0.0),
        ("\\boxed{2\\sqrt{2}}", ["3", "\\sqrt{8}"], 1.0),
        ("", "3", 0.0),
        ("no idea", "3", 0.0),
    ],
)
async def test_equivalence(
    rollout: Make, equivalent: Verifier, text: str, answer: Any, expected: float
) -> None:
    assert (await run_verifier(equivalent, rollout(text, answer))).value == expected


@pytest.mark.asyncio
async def test_answers_that_are_not_mathematics(rollout: Make, equivalent: Verifier) -> None:
    with pytest.raises(VerifierError, match="task 't1': the answer '' is not a mathematical expression"):
        await run_verifier(equivalent, rollout("3", ""))
    with pytest.raises(VerifierError, match="task 't1' has no answer"):
        await run_verifier(equivalent, rollout("3"))


@pytest.mark.asyncio
async def test_a_hanging_comparison_fails_and_the_next_one_works(rollout: Make) -> None:
    verifier = math_equivalent(timeout_s=0.5, workers=1)
    start = time.perf_counter()
    with pytest.raises(VerifierError, match=r"did not finish within 0\.5 s"):
        await run_verifier(verifier, rollout("$2$", "\\sum_{n=1}^{1000000} \\frac{1}{n^2}"))
    assert (await run_verifier(verifier, rollout("\\boxed{4}", "2+2"))).value == 1.0
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"workers": 0}])
def test_limits_are_positive(options: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be positive"):
        math_equivalent(**options)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "gym-sdk\[math\]"'):
        math_equivalent()


@pytest.fixture
def pool(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = WorkerPool("echo_worker", size=2)
    yield made
    made.close()
    assert made.pids == []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.asyncio
async def test_workers_are_reused_and_limited(pool: WorkerPool) -> None:
    pids = set()

    async def ask(i: int) -> None:
        reply = await pool.ask({"i": i, "text": "é\n"}, timeout_s=10)
        assert (reply["i"], reply["text"]) == (i, "é\n")
        pids.add(reply["pid"])

    async with anyio.create_task_group() as group:
        for i in range(20):
            group.start_soon(ask, i)
    assert len(pids) <= 2
    assert pids == set(pool.pids)


@pytest.mark.asyncio
async def test_a_dead_worker_is_replaced(pool: WorkerPool) -> None:
    with pytest.raises(WorkerDiedError, match="ended with code 7"):
        await pool.ask({"die": True}, timeout_s=10)
    first = (await pool.ask({}, timeout_s=10))["pid"]
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert (await pool.ask({}, timeout_s=10))["pid"] != first


@pytest.mark.asyncio
async def test_timeout_and_cancellation_kill_the_worker(pool: WorkerPool) -> None:
    pid = (await pool.ask({}, timeout_s=10))["pid"]
    with pytest.raises(TimeoutError):
        await pool.ask({"sleep": 60}, timeout_s=0.1)
    assert not alive(pid)
    pid = (await pool.ask({}, timeout_s=10))["pid"]
    with anyio.move_on_after(0.1):
        await pool.ask({"sleep": 60}, timeout_s=10)
    assert not alive(pid)
    assert pool.pids == []


def test_a_pool_outlives_event_loops_and_dies_with_its_owner(pool: WorkerPool, tmp_path: Any) -> None:
    pids = {asyncio.run(pool.ask({}, timeout_s=10))["pid"] for _ in range(3)}
    assert len(pids) == 1
    other = WorkerPool("echo_worker", size=1)
    pid = asyncio.run(other.ask({}, timeout_s=10))["pid"]
    del other
    gc.collect()
    assert not alive(pid)


def test_a_worker_that_cannot_start(tmp_path: Any) -> None:
    missing = WorkerPool("no_such_module_anywhere", size=1)
    with pytest.raises(WorkerDiedError, match="ended with code 1"):
        asyncio.run(missing.ask({}, timeout_s=10))
    assert missing.pids == []


def test_workers_end_with_the_process(tmp_path: Any) -> None:
    script = tmp_path / "script.py"  # without a main guard: a worker must not run it again
    script.write_text(
        "import asyncio, sys\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
        "from gym_sdk.verifiers.process import WorkerPool\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "pool = WorkerPool('echo_worker', size=1)\n"
        "print(asyncio.run(pool.ask({}, timeout_s=10))['pid'])\n"
    )
    (tmp_path / "echo_worker.py").write_text(ECHO)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert not alive(int(done.stdout))
    assert (tmp_path / "runs").read_text() == "x"
