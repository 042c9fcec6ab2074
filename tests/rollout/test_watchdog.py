"""The watchdog: lag is measured, and who blocks the loop is named."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import ScriptedTransport, say

from gym_sdk import GymClient, Rollout, Task
from gym_sdk.rollout.watchdog import LagHistogram, LoopWatchdog, watch_loop

BLOCK_S = 0.6  # at a threshold of 0.1 s: a slow machine notices too


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gym_sdk.rollout.watchdog"]


async def verify(rollout: Rollout) -> float:
    time.sleep(BLOCK_S)
    return 1.0


@pytest.mark.asyncio
async def test_a_verifier_that_blocks_is_named_by_function_and_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with LoopWatchdog(0.1) as watchdog, GymClient.over(ScriptedTransport(lambda _: say("x"))) as client:
        for _ in range(2):
            rollout = await client.rollout(Task("q"), verifier=verify)
            assert rollout.reward == 1.0
            await anyio.sleep(0.05)  # a stall ends with a heartbeat
    line = verify.__code__.co_firstlineno + 1
    place = f"verify ({__file__}:{line})"
    (message,) = (text for text in warnings_of(caplog) if "by verify" in text)  # once, however often
    assert f"by {place}, in task" in message
    assert watchdog.blocked[place] == 2
    numbers = watchdog.metrics()
    assert numbers["loop_lag_max_s"] > BLOCK_S / 2
    assert numbers["loop_blocked_s"] > BLOCK_S
    assert 0 <= numbers["loop_lag_p50_s"] <= numbers["loop_lag_p99_s"] <= numbers["loop_lag_max_s"]


def blocking_callback() -> None:
    time.sleep(BLOCK_S)


async def a_process() -> None:
    # waits in a selector of its own, which must not be taken for the loop's
    subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep({BLOCK_S})"], capture_output=True, check=True
    )


async def computing() -> None:
    for _ in range(4):
        _ = 7 ** (7**7)  # holds the interpreter's lock all the time: the watching thread comes late


async def a_callback() -> None:
    asyncio.get_running_loop().call_soon(blocking_callback)
    await asyncio.sleep(0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("block", "name"),
    [(a_process, "a_process"), (a_callback, "blocking_callback"), (computing, "computing")],
    ids=lambda value: value,
)
async def test_other_ways_to_block(
    block: Callable[[], Awaitable[None]], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with LoopWatchdog(0.1) as watchdog:
        await block()
        await anyio.sleep(0.05)
    assert name in [place.partition(" (")[0] for place in watchdog.blocked]
    assert any(f"by {name} ({__file__}:" in text for text in warnings_of(caplog))


@pytest.mark.asyncio
async def test_an_idle_loop_and_a_busy_but_fair_one_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def fair() -> None:
        for _ in range(40):
            time.sleep(0.001)
            await asyncio.sleep(0)

    caplog.set_level(logging.WARNING)
    async with LoopWatchdog(0.3) as watchdog:
        await anyio.sleep(0.3)
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(fair)
    assert warnings_of(caplog) == []
    assert not watchdog.blocked
    assert watchdog.lag_s.count > 2


@pytest.mark.asyncio
async def test_many_short_steps_in_one_turn_are_lag_but_nobody_s_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def step() -> None:
        time.sleep(0.004)

    async with LoopWatchdog(0.25) as watchdog:
        async with anyio.create_task_group() as group:
            for _ in range(150):
                group.start_soon(step)
        await anyio.sleep(0.02)
    assert warnings_of(caplog) == []
    assert watchdog.metrics()["loop_lag_max_s"] > 0.3


@pytest.mark.asyncio
async def test_all_who_watch_a_loop_share_one_watchdog() -> None:
    def threads() -> int:
        return sum(thread.name == "gym-sdk watchdog" for thread in threading.enumerate())

    async with watch_loop() as one:
        async with watch_loop() as two:
            assert one is two
            assert threads() == 1
        await anyio.sleep(0.12)
        assert one.lag_s.count
        assert threads() == 1
    assert threads() == 0
    async with watch_loop() as three:
        assert three is not one
    with pytest.raises(RuntimeError, match="watches once"):
        async with three:
            raise AssertionError


def test_it_ends_with_an_error_and_in_loops_one_after_the_other() -> None:
    async def fail() -> None:
        async with watch_loop():
            raise KeyError("k")

    for _ in range(2):
        with pytest.raises(KeyError):
            asyncio.run(fail())
    assert not [thread for thread in threading.enumerate() if thread.name == "gym-sdk watchdog"]


@given(st.lists(st.floats(0, 1000), min_size=1), st.floats(0, 1))
def test_percentiles_are_close_from_above(values: list[float], share: float) -> None:
    histogram = LagHistogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    found = histogram.percentile(share)
    assert histogram.max_s == max(values)
    assert exact <= found * (1 + 1e-9)
    assert found <= max(exact * 1.0906, 1e-4)


def test_an_empty_histogram_has_no_lag() -> None:
    assert LagHistogram().percentile(0.99) == 0.0
