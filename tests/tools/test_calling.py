"""Calling what users wrote: threads that hang, deadlines that are ignored, cancellations that are none."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from gym_sdk import threads
from gym_sdk.calling import call_function, is_async
from gym_sdk.deadline import Deadline
from gym_sdk.errors import ToolError
from gym_sdk.threads import ThreadsExhaustedError, worker_threads
from gym_sdk.tools import tool


async def coroutine_function() -> int:
    return 1


def plain() -> int:
    return 1


class Object:
    async def __call__(self) -> int:
        return 1

    async def method(self) -> int:
        return 1

    def plain(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (coroutine_function, True),
        (Object(), True),
        (Object().method, True),
        (functools.partial(functools.partial(coroutine_function)), True),
        (functools.partial(Object().method), True),
        (plain, False),
        (Object().plain, False),
        (functools.partial(plain), False),
        (Object, False),
        (len, False),
    ],
)
@pytest.mark.asyncio
async def test_which_functions_run_on_the_loop(function: Any, expected: bool) -> None:
    assert is_async(function) == expected
    if function not in (Object, len):
        assert await call_function(function) == 1


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opens at the end of a test, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


async def abandon(function: Any, count: int, meanwhile: Any = None) -> None:
    """Call a function that hangs, start something else, and stop waiting for the function."""
    begun = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()

    def hang() -> None:
        loop.call_soon_threadsafe(begun.release)
        function()

    hang.__name__ = "hang"
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(call_function, hang)
        for _ in range(count):
            await begun.acquire()
        if meanwhile is not None:
            asyncio.get_running_loop().call_later(0.05, group.cancel_scope.cancel)
            with anyio.CancelScope(shield=True):
                await meanwhile()
        group.cancel_scope.cancel()


@pytest.mark.asyncio
async def test_functions_that_hang_take_nobody_s_place(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    pool = worker_threads()
    pool.size = 2
    for expected in (2, 4, 6):
        await abandon(gate.wait, 2)
        assert pool.abandoned == expected
        assert await call_function(plain) == 1
    assert pool.awaited == 0
    messages = [record.getMessage() for record in caplog.records if record.name == "gym_sdk.threads"]
    assert len(messages) == 1  # once for each function
    assert "hang still runs in a thread, and nobody waits for it" in messages[0]
    gate.set()
    while pool.abandoned:
        await anyio.sleep(0.001)


@pytest.mark.asyncio
async def test_too_many_that_hang_are_an_error_until_they_end(gate: threading.Event) -> None:
    pool = worker_threads()
    pool.size, pool.max_abandoned = 1, 1
    tested = tool(plain)

    async def wait_in_vain() -> None:
        with pytest.raises(ThreadsExhaustedError, match="1 threads hang"):
            await call_function(plain)

    await abandon(gate.wait, 1, meanwhile=wait_in_vain)  # the place goes to nobody when it is left
    with pytest.raises(ThreadsExhaustedError, match=r"1 threads hang .* \(hang\)"):
        await call_function(plain)
    with pytest.raises(ToolError, match="plain failed: 1 threads hang"):
        await tested.run("")
    gate.set()
    while pool.abandoned:
        await anyio.sleep(0.001)
    assert await tested.run("") == "1"


@pytest.mark.asyncio
async def test_no_more_than_size_run_at_once_and_who_is_cancelled_while_waiting_leaves_no_gap(
    gate: threading.Event,
) -> None:
    pool = worker_threads()
    pool.size = 3
    lock = threading.Lock()
    running, most, calls = 0, 0, 0

    def work() -> None:
        nonlocal running, most, calls
        with lock:
            running += 1
            calls += 1
            most = max(most, running)
        gate.wait(30)
        with lock:
            running -= 1

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(call_function, work)
        while pool.awaited < 3:
            await anyio.sleep(0.001)
        with anyio.move_on_after(0.01) as scope:
            await call_function(work)
        assert scope.cancelled_caught
        gate.set()
    assert (most, calls) == (3, 10)
    assert pool.awaited == 0


@pytest.mark.asyncio
async def test_a_thread_sees_the_caller_s_context_and_may_run_a_loop() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("seen")

    def read() -> str:
        return anyio.run(nested)

    async def nested() -> str:
        return variable.get()

    def stop() -> None:
        raise StopIteration

    assert await call_function(read) == "seen"
    with pytest.raises(RuntimeError, match="stop raised StopIteration"):
        await call_function(stop)


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "gym-sdk worker"}


def test_threads_end_with_their_loop() -> None:
    async def use() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(call_function, time.sleep, 0.01)

    before = workers()
    asyncio.run(use())
    until = time.monotonic() + 20
    while workers() - before and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert workers() <= before


@pytest.mark.asyncio
async def test_threads_without_work_end_and_new_ones_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_IDLE_S", 0.001)
    before = workers()
    for _ in range(300):  # some calls come just when a thread leaves
        await asyncio.wait_for(call_function(plain), 30)
        await anyio.sleep(random.uniform(0, 0.003))
    while workers() - before:
        await anyio.sleep(0.001)


def test_a_function_that_hangs_does_not_keep_the_program() -> None:
    code = (
        "import anyio, time\n"
        "from gym_sdk.calling import call_function\n"
        "async def main():\n"
        "    with anyio.move_on_after(0.05):\n"
        "        await call_function(time.sleep, 600)\n"
        "anyio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "sleep still runs in a thread" in done.stderr


@pytest.mark.asyncio
async def test_a_deadline_cancels_once_and_passes_on_what_is_not_its_own() -> None:
    with Deadline(0.01) as deadline:
        await anyio.sleep(30)
    assert deadline.expired
    with Deadline(None) as deadline:
        await anyio.sleep(0)
    assert not deadline.expired
    with pytest.raises(KeyError):
        with Deadline(30):
            raise KeyError
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_a_deadline_within_scopes_that_are_cancelled() -> None:
    for inner_s, outer_s, expired in ((0.01, 30.0, True), (30.0, 0.01, False), (0.01, 0.01, None)):
        with anyio.move_on_after(outer_s) as scope:
            with Deadline(inner_s) as deadline:
                await anyio.sleep(30)
            assert deadline.expired
            await anyio.sleep(0)
        if expired is not None:
            assert deadline.expired == expired
            assert scope.cancelled_caught != expired
        assert deadline.expired or scope.cancelled_caught
    await anyio.sleep(0)

    async def outer() -> None:
        with Deadline(30):
            await anyio.sleep(30)

    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_work_that_ignores_its_deadline_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_sdk.deadline._CANCEL_AGAIN_S", 0.01)
    ignored = 0

    @tool(timeout_s=0.01)
    async def stubborn() -> None:
        nonlocal ignored
        while ignored < 3:
            try:
                await anyio.sleep(30)
            except BaseException:
                ignored += 1
        await anyio.sleep(30)

    with pytest.raises(ToolError, match=r"stubborn did not finish within 0\.01 s"):
        await stubborn.run("")
    assert ignored == 3


@pytest.mark.asyncio
async def test_a_tool_that_cancels_only_itself_does_not_end_the_rollout() -> None:
    @tool
    async def careless() -> None:
        mine = asyncio.create_task(anyio.sleep(30))
        mine.cancel()
        await mine

    with pytest.raises(ToolError, match="careless failed: RuntimeError: it raised CancelledError"):
        await careless.run("")
