"""Verifiers that hang, fork, raise, leave, or return nonsense: their rollout fails, and is not scored."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import bad_verifiers
from support.bad_verifiers import is_bad, is_right
from support.collecting import collected, failed, leaving_nothing, look
from support.faulty_policy import serving
from support.held import until

from gym_sdk import Deadlines, GymClient, Rollout
from gym_sdk.environments import Environment
from gym_sdk.processes import pool_of
from gym_sdk.processes.child import MARK
from gym_sdk.rollout import Collection
from gym_sdk.schema import FailureKind, Stage

pytestmark = pytest.mark.asyncio

VERIFIER = FailureKind.VERIFIER


async def verified(verifier: Any, store: Path, **deadlines: float) -> Collection:
    """Collect with a verifier that misbehaves for question 1: its two rollouts fail, the others do not."""
    async with serving() as policy, leaving_nothing(policy):
        async with GymClient(policy.url) as client, asyncio.timeout(60):
            collection = await collected(client, store, verifier=verifier, deadlines=Deadlines(**deadlines))
        if hasattr(verifier, MARK):
            pool_of(verifier).close()
    assert [rollout.task.answer for rollout in collection.failures] == [7, 7]
    assert collection.mean_reward == 1.0
    return collection


async def nothing() -> None:
    pass


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


NONSENSE: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "did it forget to return?"),
    "NaN": (lambda: float("nan"), "nan"),
    "inf": (lambda: float("inf"), "inf"),
    "text": (lambda: "1", "'1'"),
    "list": (list, "list"),
    "object": (object, "object"),
    "coroutine": (lambda: nothing(), "did it forget to await?"),
    "too large": (lambda: 10**400, "inf"),
    "complex": (lambda: 1j, "complex"),
    "empty mapping": (dict, "empty mapping"),
    "None in a mapping": (lambda: {"style": 1.0, "answer": None}, "component 'answer'"),
    "NaN in a mapping": (lambda: {"reward": 1.0, "answer": float("nan")}, "component 'answer'"),
    "a number as a name": (lambda: {1: 1.0}, "named 1"),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense(name: str, tmp_path: Path) -> None:
    make, said = NONSENSE[name]

    async def odd(rollout: Rollout) -> Any:
        return make() if is_bad(rollout) else is_right(rollout)

    collection = await verified(odd, tmp_path / "r.jsonl")
    failed(collection, VERIFIER, Stage.VERIFIER, "verifier odd returned", said)


RAISED: dict[str, tuple[Callable[[], BaseException], str]] = {
    "an error": (lambda: LookupError("no such answer"), "LookupError: no such answer"),
    "exit": (lambda: SystemExit(3), "SystemExit: 3"),
    "a cancellation": (asyncio.CancelledError, "ancelled"),
    "a group": (lambda: ExceptionGroup("many", [KeyError("a"), ValueError("b")]), "the first of 2 errors"),
    "a timeout": (lambda: TimeoutError("too late"), "TimeoutError: too late"),
    "the end of a generator": (lambda: StopAsyncIteration("x"), "StopAsyncIteration"),
    "an error without a text": (Unreadable, "cannot be read"),
    "a lone surrogate": (lambda: OSError("file \udcff"), "OSError"),
}


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.parametrize("plain", [False, True], ids=["coroutine", "thread"])
async def test_raising(name: str, plain: bool, tmp_path: Path) -> None:
    make, said = RAISED[name]

    def odd(rollout: Rollout) -> float:
        if is_bad(rollout):
            raise make()
        return is_right(rollout)

    async def odd_coroutine(rollout: Rollout) -> float:
        return odd(rollout)

    collection = await verified(odd if plain else odd_coroutine, tmp_path / "r.jsonl")
    failed(collection, VERIFIER, Stage.VERIFIER, "verifier odd", said)


async def test_a_coroutine_that_hangs(tmp_path: Path) -> None:
    async def hang(rollout: Rollout) -> float:
        if is_bad(rollout):
            await asyncio.Event().wait()
        return is_right(rollout)

    collection = await verified(hang, tmp_path / "r.jsonl", verifier_s=0.2)
    failed(collection, FailureKind.DEADLINE, Stage.VERIFIER, "the verifier", "deadline of 0.2 s")


async def test_a_coroutine_that_hangs_on_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cancelled again and again."""
    monkeypatch.setattr("gym_sdk.deadline._CANCEL_AGAIN_S", 0.05)

    async def hang(rollout: Rollout) -> float:
        for _ in range(3 if is_bad(rollout) else 0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue
        return is_right(rollout)

    collection = await verified(hang, tmp_path / "r.jsonl", verifier_s=0.2)
    failed(collection, FailureKind.DEADLINE, Stage.VERIFIER, "the verifier", "deadline of 0.2 s")


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hangs in threads ends with the test."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_thread_that_hangs(released: threading.Event, tmp_path: Path) -> None:
    def hang(rollout: Rollout) -> float:
        if is_bad(rollout):
            released.wait(60)
        return is_right(rollout)

    collection = await verified(hang, tmp_path / "r.jsonl", verifier_s=0.2)
    failed(collection, FailureKind.DEADLINE, Stage.VERIFIER, "the verifier", "deadline of 0.2 s")


async def test_a_thread_that_forks(tmp_path: Path) -> None:
    """The copy ends where it was made: it must not hold the connections open, nor answer for the original."""
    copies: list[int] = []

    def fork(rollout: Rollout) -> float:
        if is_bad(rollout):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about threads
                pid = os.fork()
            if pid:
                copies.append(pid)
        return is_right(rollout)

    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        collection = await collected(client, tmp_path / "r.jsonl", verifier=fork)
        assert not collection.failures
        try:
            await until(lambda: all(map(has_ended, copies)), 3)
        finally:
            for pid in copies:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    assert len(copies) == 2


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def alive_in(sessions: set[int]) -> list[psutil.Process]:
    """Return the processes of these sessions, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


IN_PROCESS = {
    "hangs": "did not finish within its deadline of 0.5 s",
    "exits": "SystemExit: 3",
    "dies": "the worker process ended with code 3",
    "raises": "LookupError: no such answer",
    "forks": None,
}


@pytest.mark.parametrize("name", IN_PROCESS)
async def test_in_a_process(name: str, tmp_path: Path) -> None:
    """Whatever it does there, and whatever it starts, ends with its process."""
    verifier, said = getattr(bad_verifiers, name), IN_PROCESS[name]
    sessions: set[int] = set()

    async def watch() -> None:
        while True:
            sessions.update(pool_of(verifier).pids)
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    try:
        if said is not None:
            collection = await verified(verifier, tmp_path / "r.jsonl")
            failed(collection, VERIFIER, Stage.VERIFIER, f"verifier {name}", said)
        else:
            async with serving() as policy, GymClient(policy.url) as client:
                collection = await collected(client, tmp_path / "r.jsonl", verifier=verifier)
            assert not collection.failures
    finally:
        pool_of(verifier).close()
        watching.cancel()
    assert sessions
    await until(lambda: not alive_in(sessions), 10)


async def test_group_verifiers_that_fail(tmp_path: Path) -> None:
    """No rollout of the group has a reward without the others'; other groups have theirs."""

    async def odd(rollouts: list[Rollout]) -> list[float]:
        return [1.0] if is_bad(rollouts[0]) else [is_right(rollout) for rollout in rollouts]

    environment = Environment(tools=[look], group_verifier=odd)
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        collection = await collected(
            client, tmp_path / "r.jsonl", tools=(), verifier=None, environment=environment
        )
    found = failed(collection, VERIFIER, Stage.GROUP_VERIFIER, "odd")
    assert [rollout.task.answer for rollout in found] == [7, 7]
    assert collection.mean_reward == 1.0
