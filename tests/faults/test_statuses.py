"""Servers that say that they are busy or broken, for a while and for ever; clocks that jump meanwhile."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from pathlib import Path

import pytest
from support.collecting import IMPATIENT, PATIENT, QUICK, collected, failed, leaving_nothing
from support.faulty_policy import Asked, Fault, always, every, first, serving
from support.faulty_server import answer

from gym_sdk import GymClient, Limits, Retry
from gym_sdk.schema import FailureKind, Stage
from gym_sdk.transport import Breaker

pytestmark = pytest.mark.asyncio

BROKEN = ("500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable")
BUSY = "429 Too Many Requests"


def said(status: str, **headers: str) -> bytes:
    """Return an error; `Retry_After="1"` is the header `Retry-After`."""
    error = {"error": {"message": "the engine is upset", "code": None}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return answer(error, status=status, headers=named)


@pytest.mark.parametrize("status", [*BROKEN, BUSY, "408 Request Timeout"])
async def test_for_a_while(status: str, tmp_path: Path) -> None:
    """The first calls fail, and so do some later ones."""

    def script(asked: Asked) -> Fault:
        return said(status) if asked.number < 15 or asked.number % 4 == 0 else None

    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=Retry(8, 0.005, 0.02), breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert not collection.failures
    assert policy.samples >= 15 + 24


@pytest.mark.parametrize("status", BROKEN)
async def test_broken_for_ever(status: str, tmp_path: Path) -> None:
    async with serving(always(said(status)), is_well=False) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", limits=Limits(concurrency=4))
        # the circuit breaker keeps the calls of later rollouts from a server that is out
        assert policy.samples <= 4 + 3
    assert len(failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL, policy.url, status[:3])) == 12


async def test_broken_for_ever_though_its_probe_succeeds(tmp_path: Path) -> None:
    async with serving(always(said(BROKEN[0]))) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
        assert policy.samples <= 12 * QUICK.attempts * 2
    failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL, policy.url, "500", "the engine is upset")
    assert len(collection.failures) == 12


async def test_busy_for_ever(tmp_path: Path) -> None:
    """Nobody's fault: calls wait as long as they would for a server that is out, then say why."""
    async with serving(always(said(BUSY))) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert len(failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL, policy.url, "429", "upset")) == 12


async def test_a_server_that_takes_two_calls_at_once(tmp_path: Path) -> None:
    async with serving(latency_s=0.005) as policy, leaving_nothing(policy):
        policy.fault = lambda asked: said(BUSY) if policy.in_flight > 2 else None
        async with GymClient(policy.url, retry=Retry(4, 0.01, 0.1), breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=30)
    assert not collection.failures


async def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    """By the monotonic clock, in which nothing jumps; the least that counts is what the server asked for."""
    times: list[float] = []

    def script(asked: Asked) -> Fault:
        times.append(time.monotonic())
        return said(BUSY, Retry_After="0.3") if asked.number == 0 else None

    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=Retry(4, 0.01, 5.0)) as client:
            assert not (await collected(client, tmp_path / "r.jsonl", count=1, group_size=1)).failures
    assert times[1] - times[0] >= 0.29


@pytest.mark.parametrize(
    "after",
    [
        "soon",
        "-5",
        "nan",
        "inf",
        "1e400",
        "",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "0",
    ],
)
async def test_odd_values_of_retry_after(after: str, tmp_path: Path) -> None:
    script = first(3, said(BROKEN[2], Retry_After=after))
    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=Retry(8, 0.01, 0.02), breaker=PATIENT) as client:
            assert not (await collected(client, tmp_path / "r.jsonl", count=2)).failures


@pytest.mark.parametrize("hours", [-48.0, 48.0])
async def test_a_clock_that_jumps(hours: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines, pauses and durations are by a clock that does not; a date is read by the server's own."""
    real, jumped = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + jumped)

    def script(asked: Asked) -> Fault:
        nonlocal jumped
        jumped = random.choice((0.0, hours * 3600.0))
        if asked.number % 5:
            return None
        now = real() - 7200.0  # the server's clock is two hours late
        dates = {"Date": email.utils.formatdate(now, usegmt=True)}
        return said(BROKEN[2], Retry_After=email.utils.formatdate(now, usegmt=True), **dates)

    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=Retry(8, 0.005, 30.0), breaker=PATIENT) as client:
            async with asyncio.timeout(60):
                collection = await collected(client, tmp_path / "r.jsonl", count=20)
    assert not collection.failures
    assert 0.0 <= collection.duration_s < 60.0
    for rollout in collection.rollouts:
        for name in ("duration_s", "model_s", "tool_s", "verifier_s", "wait_s"):
            assert 0.0 <= getattr(rollout.timing, name) < 60.0


async def test_a_retry_budget_ends_a_storm(tmp_path: Path) -> None:
    """Half of all calls fail: without a budget, they would be sent again and again."""
    retry = Retry(20, 0.001, 0.002, budget=0.1, reserve=10.0)
    async with serving(every(2, said(BROKEN[0]))) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=retry, breaker=Breaker(failures=1000)) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=50)
    assert policy.samples <= 1.1 * 200 + 10
    failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL, "500", "Retry.budget")
