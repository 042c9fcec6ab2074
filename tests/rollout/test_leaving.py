"""How a stream ends, whatever ends it: nothing is left running, and each error is raised once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import pytest_asyncio
from support.by_hand import ByHand
from support.held import until
from support.scripted import ScriptedTransport, call, say

from gym_sdk import Deadlines, GymClient, Limits, Rollout, Task, tool
from gym_sdk.environments import Environment
from gym_sdk.errors import DatasetError, DeadlineError, StoreError
from gym_sdk.rollout import read_rollouts, scheduler
from gym_sdk.schema import FailureKind, Outcome, Stage
from gym_sdk.store import Journal

pytestmark = pytest.mark.asyncio


def tasks(count: int) -> list[Task]:
    return [Task(f"q{n}", id=f"q{n}") for n in range(count)]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_LEAVE_S", 0.1)


@pytest_asyncio.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """Check that a test leaves no task behind."""
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert left == set()


async def test_leaving_early_ends_calls_tools_and_verifiers_and_tears_down() -> None:
    running: list[str] = []
    ended: list[str] = []
    states: list[str | None] = []

    async def stay(name: str) -> None:
        running.append(name)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)

    @tool
    async def wait() -> str:
        """Wait."""
        await stay("tool")
        return ""

    async def verify(rollout: Rollout) -> float:
        await stay("verifier")
        return 1.0

    async def model(request: Any) -> Any:
        text = request.input[0].text
        if text == "q0":
            return call(("wait", "{}"))
        if text == "q2":
            await stay("model")
        return say("x")

    async def setup(task: Task) -> str | None:
        states.append(task.id)
        return task.id

    async def teardown(state: str) -> None:
        await asyncio.sleep(0.01)
        states.remove(state)

    environment = Environment(tools=[wait], verifier=verify, setup=setup, teardown=teardown)
    async with GymClient.over(ScriptedTransport(model)) as client:
        async with client.rollouts(tasks(3), environment=environment):
            await until(lambda: len(running) == 3)
    assert sorted(ended) == ["model", "tool", "verifier"]
    assert states == []


async def leave_at_once(client: GymClient) -> None:
    async with client.rollouts(tasks(300), limits=Limits(concurrency=200)) as stream:
        while not stream._scheduler._flights:
            await asyncio.sleep(0)  # started, and not begun


async def test_rollouts_that_have_not_begun_end_as_well() -> None:
    transport = ScriptedTransport(ByHand())
    async with GymClient.over(transport) as client:
        async with asyncio.timeout(5):
            await leave_at_once(client)
    assert transport.requests == []


async def cancelled_in(client: GymClient, entered: asyncio.Event) -> None:
    async with client.rollouts(tasks(5)) as stream:
        entered.set()
        async for _ in stream:
            pass


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_from_outside_even_while_it_ends(times: int) -> None:
    leaving = asyncio.Event()

    async def slow_to_end(request: Any) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            leaving.set()
            await asyncio.sleep(0.03)
            raise

    transport = ScriptedTransport(slow_to_end)
    async with GymClient.over(transport) as client:
        entered = asyncio.Event()
        task = asyncio.create_task(cancelled_in(client, entered))
        await until(lambda: transport.running == 5)
        for _ in range(times):
            task.cancel()
            await leaving.wait()
            assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert transport.running == 0


async def test_a_scope_that_cancels_again_and_again_does_not_spin(monkeypatch: Any) -> None:
    async def slow_to_end(request: Any) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            raise

    waits = 0
    real_wait = asyncio.wait

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal waits
        waits += 1
        return await real_wait(*args, **kwargs)

    monkeypatch.setattr(asyncio, "wait", counted)
    async with GymClient.over(ScriptedTransport(slow_to_end)) as client:
        with anyio.move_on_after(0.05) as scope:
            async with client.rollouts(tasks(3)) as stream:
                await anext(stream)
        assert scope.cancelled_caught
    assert waits <= 3


@pytest.mark.parametrize("where", ["tool", "verifier"])
async def test_code_that_swallows_its_cancellation_is_cancelled_again(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun = asyncio.Event()
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        begun.set()
        while swallowed < 1:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
        await asyncio.sleep(60)

    async def verify(rollout: Rollout) -> float:
        await stubborn()
        return 1.0

    @tool
    async def work() -> str:
        """Work."""
        await stubborn()
        return ""

    script = call(("work", "{}")) if where == "tool" else say("x")
    environment = Environment(tools=[work], verifier=verify if where == "verifier" else None)
    async with GymClient.over(ScriptedTransport(lambda request: script)) as client:
        with anyio.fail_after(5):
            async with client.rollouts(tasks(1), environment=environment):
                await begun.wait()
    assert swallowed == 1
    if where == "verifier":
        assert "rollout 0 of task q0 was cancelled 0.1 s ago and goes on" in caplog.text


async def test_what_never_ends_is_left_alone_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def verify(rollout: Rollout) -> float:
        begun.set()
        while not end.is_set():
            with suppress(asyncio.CancelledError):
                await end.wait()
        return 1.0

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        with anyio.fail_after(5):
            async with client.rollouts(tasks(1), verifier=verify):
                await begun.wait()
        assert caplog.text.count("goes on") == 3
        end.set()
        await asyncio.sleep(0.01)


async def test_a_cancellation_of_its_own_making_is_a_failure() -> None:
    async def verify(rollout: Rollout) -> float:
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task
        return 1.0

    async def setup(task: Task) -> None:
        raise asyncio.CancelledError

    async def together(rollouts: Any) -> list[float]:
        raise asyncio.CancelledError

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        (group,) = (await client.collect(tasks(1), verifier=verify)).groups
        failure = group.rollouts[0].failure
        assert failure is not None
        assert (failure.where, failure.error) == (Stage.VERIFIER, "VerifierError")
        (group,) = (await client.collect(tasks(1), environment=Environment(setup=setup))).groups
        failure = group.rollouts[0].failure
        assert failure is not None
        assert failure.where is Stage.SETUP
        (group,) = (await client.collect(tasks(1), environment=Environment(group_verifier=together))).groups
        failure = group.rollouts[0].failure
        assert failure is not None
        assert failure.where is Stage.GROUP_VERIFIER


async def test_an_interrupt_in_a_rollout_reaches_who_iterates() -> None:
    async def verify(rollout: Rollout) -> float:
        raise KeyboardInterrupt

    transport = ScriptedTransport(lambda request: say("x"))
    async with GymClient.over(transport) as client:
        with pytest.raises(KeyboardInterrupt):
            await client.collect(tasks(3), verifier=verify)
    assert transport.running == 0


async def test_sources_that_end_in_other_ways() -> None:
    def interrupted() -> Iterator[Task]:
        yield from tasks(1)
        raise KeyboardInterrupt

    async def cancelled() -> Any:
        yield tasks(1)[0]
        raise asyncio.CancelledError

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        with pytest.raises(KeyboardInterrupt):
            await client.collect(interrupted())
        with pytest.raises(Exception, match="the task source was cancelled, but not by the stream"):
            await client.collect(cancelled())


async def test_the_runs_deadline_comes_after_the_groups_that_had_finished() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        groups = []
        with pytest.raises(DeadlineError, match="the run"):
            async with client.rollouts(tasks(5), deadlines=Deadlines(run_s=0.1)) as stream:
                for held in (await hand.arrived(5))[:2]:
                    held.answer()
                await until(lambda: stream._scheduler.failure is not None)
                async for group in stream:
                    groups.append(group)  # noqa: PERF401
    assert {group.task.id for group in groups} == {"q0", "q1"}
    assert all(held.cancelled for held in hand.calls[2:])


async def test_a_run_that_is_done_in_time_may_be_taken_later() -> None:
    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        async with client.rollouts(tasks(3), deadlines=Deadlines(run_s=0.2)) as stream:
            await until(lambda: stream._scheduler.idle)
            await asyncio.sleep(0.25)
            assert len([group async for group in stream]) == 3


async def test_an_error_of_the_body_goes_before_the_streams(caplog: pytest.LogCaptureFixture) -> None:
    async with GymClient.over(ScriptedTransport(ByHand())) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.rollouts(tasks(3), deadlines=Deadlines(run_s=0.01)) as stream:
                await until(lambda: stream._scheduler.failure is not None)
                raise ZeroDivisionError
    assert "the stream had failed when it was left: DeadlineError" in caplog.text


async def test_the_tracker_is_told_of_the_end(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Mapping[str, float]] = []

    class Noting:
        def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
            told.append(metrics)

        def log_config(self, config: Mapping[str, Any]) -> None: ...

        def log_table(self, name: str, table: Any, *, step: int | None = None) -> None: ...

        async def aclose(self) -> None: ...

    async with GymClient.over(ScriptedTransport(ByHand())) as client:
        async with client.rollouts(tasks(3), tracker=Noting()) as stream:
            await until(lambda: len(stream._scheduler._flights) == 3)
    assert told[-1]["outcomes/cancelled"] == 3.0
    assert told[-1]["groups/dropped"] == 0.0


async def test_an_error_of_the_store_ends_the_stream_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    write = Journal.write

    def full(self: Journal, rollout: Rollout) -> None:
        nonlocal written
        if written == 2:
            raise StoreError("cannot be written: no space left", path=self.path)
        written += 1
        write(self, rollout)

    monkeypatch.setattr(Journal, "write", full)
    hand = ByHand()
    store = tmp_path / "r.jsonl"
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(4), store=store) as stream:
            for held in (await hand.arrived(4))[:3]:
                held.answer()
            assert {(await anext(stream)).task.id for _ in range(2)} == {"q0", "q1"}
            with pytest.raises(StoreError, match="no space"):
                await anext(stream)
        with pytest.raises(StoreError, match="no space"):  # also for who does not ask again
            async with client.rollouts(tasks(4), store=tmp_path / "other.jsonl") as stream:
                for held in (await hand.arrived(8))[4:]:
                    held.answer()
                await until(lambda: stream._scheduler.failure is not None)
    assert [rollout.task_id for rollout in read_rollouts(store)] == ["q0", "q1"]


async def test_a_tracker_that_breaks_costs_no_rollout(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
            raise RuntimeError("no such project")

        def log_config(self, config: Mapping[str, Any]) -> None: ...

        def log_table(self, name: str, table: Any, *, step: int | None = None) -> None: ...

        async def aclose(self) -> None: ...

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        assert len((await client.collect(tasks(3), tracker=Broken())).groups) == 3
    assert "the tracker failed" in caplog.text


async def test_the_store_is_closed_and_free_again_after_every_end(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    async with GymClient.over(ScriptedTransport(ByHand())) as client:
        for error in (ZeroDivisionError, asyncio.CancelledError, KeyboardInterrupt):
            with pytest.raises(error):
                async with client.rollouts(tasks(2), store=store):
                    raise error
            with Journal(store) as journal:
                assert len(journal) == 0


async def test_a_broken_source_is_told_of_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def source() -> Iterator[Task]:
        yield from tasks(2)
        raise DatasetError("not JSON", path="t.jsonl", line=3)

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        with caplog.at_level(logging.WARNING), pytest.raises(DatasetError):
            await client.collect(source())
    assert "the task source failed after 2 tasks" in caplog.text


async def test_kinds_of_failures_are_told_apart() -> None:
    async def verify(rollout: Rollout) -> float:
        await asyncio.sleep(60)
        return 1.0

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        collection = await client.collect(tasks(1), verifier=verify, deadlines=Deadlines(verifier_s=0.02))
    failed = collection.groups[0].rollouts[0]
    assert failed.outcome is Outcome.FAILED
    assert failed.failure is not None
    assert failed.failure.kind is FailureKind.DEADLINE
