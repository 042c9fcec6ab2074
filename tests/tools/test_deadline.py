"""Deadlines: of their own or shared, they cut short what takes too long, and nothing else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from gym_sdk import deadline
from gym_sdk.deadline import Deadline
from gym_sdk.errors import DeadlineError

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["own", "shared"])
def timers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "shared":
        monkeypatch.setattr(deadline, "_SHARED_S", 0.0)
        monkeypatch.setattr(deadline, "_TICK_S", 0.01)


async def test_a_deadline_and_a_cancellation_at_the_same_moment(timers: None) -> None:
    """Whoever cancels the task from outside wins: a cancellation is never taken for a deadline."""

    async def run(cancel: Callable[[], object] | None) -> None:
        with Deadline(0.0, "it"):
            if cancel is not None:
                asyncio.get_running_loop().call_later(0.0, cancel)
            await asyncio.Event().wait()

    task = asyncio.create_task(run(None))
    with pytest.raises(TimeoutError, match="it did not finish"):
        await task
    assert task.cancelling() == 0
    task = asyncio.create_task(run(lambda: task.cancel()))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_thousands_end_each_in_its_time(timers: None) -> None:
    chosen = random.Random(1)
    cut: list[bool] = []

    async def work(seconds: float, allowed_s: float) -> None:
        started = asyncio.get_running_loop().time()
        with Deadline(allowed_s) as limit:
            await asyncio.sleep(seconds)
        assert limit.expired == (seconds > allowed_s)
        if limit.expired:
            assert asyncio.get_running_loop().time() - started >= allowed_s - 0.001
        cut.append(limit.expired)

    async with asyncio.TaskGroup() as group:
        for _ in range(2000):
            group.create_task(work(*chosen.choice([(0.0, 5.0), (9.0, chosen.uniform(0.0, 0.1))])))
    assert len(cut) == 2000
    assert 0 < sum(cut) < 2000


async def test_one_inside_another(timers: None) -> None:
    with Deadline(30.0) as outer:
        with (
            pytest.raises(DeadlineError, match="the inner one did not finish"),
            Deadline(0.02, "the inner one"),
        ):
            await asyncio.sleep(30)
        with Deadline(0.02) as last:
            await asyncio.sleep(30)
    assert last.expired
    assert not outer.expired
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_what_ended_in_time_leaves_nothing_behind(timers: None) -> None:
    with Deadline(0.05):
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    assert not deadline._buckets.get(asyncio.get_running_loop())
