"""Many rollouts: groups, admission, leaving early, stores, sources that fail."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedTransport, in_turn, say

from gym_sdk import GymClient, Limits, Outcome, Retry, Rollout, Task
from gym_sdk.errors import ConfigurationError, DatasetError, PolicyError, StoreError
from gym_sdk.rollout import pass_at_k, read_rollouts
from gym_sdk.schema import ResponseRequest

pytestmark = pytest.mark.asyncio


def tasks(count: int) -> list[Task]:
    return [Task(f"question {n}", answer=n) for n in range(count)]


async def index_is_even(rollout: Rollout) -> float:
    return float(rollout.index % 2 == 0)


async def jittery(request: ResponseRequest) -> Any:
    await anyio.sleep(random.uniform(0, 0.01))
    return say("x")


async def test_groups_are_whole_and_come_as_they_finish(tmp_path: Path) -> None:
    transport = ScriptedTransport(jittery)
    store = tmp_path / "deep" / "rollouts.jsonl"
    async with GymClient.over(transport) as client:
        seen = []
        async with client.rollouts(
            tasks(20), group_size=4, verifier=index_is_even, limits=Limits(concurrency=10), store=store
        ) as stream:
            async for group in stream:
                assert [rollout.index for rollout in group.rollouts] == [0, 1, 2, 3]
                assert {rollout.task_id for rollout in group.rollouts} == {group.task.id}
                assert group.rewards == [1.0, 0.0, 1.0, 0.0]
                seen.append(stream.position(group.task))
    assert sorted(seen) == list(range(20))
    assert transport.most_running <= 10
    stored = list(read_rollouts(store))
    assert len(stored) == 80
    assert {(rollout.task_id, rollout.index) for rollout in stored} == {
        (f"task-{n:06d}", index) for n in range(20) for index in range(4)
    }


async def test_collect_orders_by_task_and_counts() -> None:
    def script(request: ResponseRequest) -> Any:
        text = request.input[0].text  # type: ignore[union-attr]
        return PolicyError("refused") if text == "question 3" else say("x")

    async with GymClient.over(ScriptedTransport(script)) as client:
        collection = await client.collect(tasks(6), group_size=2, verifier=index_is_even)
    assert [group.task.answer for group in collection.groups] == list(range(6))
    numbers = collection.summary()
    assert numbers["rollouts"] == 12
    assert numbers["failed"] == 2
    assert numbers["mean_reward"] == 0.5
    assert numbers["pass@1"] == 0.5
    assert numbers["pass@2"] == 1.0
    assert collection.failure_counts() == {"PolicyError in model_call": 2}
    assert repr(collection) == "<Collection of 6 tasks, 12 rollouts, mean reward 0.5>"
    text = str(collection)
    assert "refused" in text
    assert "failed" in text
    assert "<table>" in collection._repr_html_()
    assert len(collection.sequences()) == 10


async def test_leaving_early_cancels_what_is_in_flight() -> None:
    async def slow(request: ResponseRequest) -> Any:
        if request.input[0].text != "question 0":  # type: ignore[union-attr]
            await anyio.sleep_forever()
        return say("x")

    transport = ScriptedTransport(slow)
    async with GymClient.over(transport) as client:
        with anyio.fail_after(5):
            async with client.rollouts(tasks(50), limits=Limits(concurrency=8)) as stream:
                async for _ in stream:
                    break
    assert transport.running == 0
    assert len(transport.requests) <= 9


async def test_the_callers_own_exception_passes_as_it_is() -> None:
    async with GymClient.over(ScriptedTransport(jittery)) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.rollouts(tasks(5)) as stream:
                async for _ in stream:
                    1 / 0  # noqa: B018


async def test_cancellation_from_outside_leaves_nothing_running() -> None:
    async def never(request: ResponseRequest) -> Any:
        await anyio.sleep_forever()

    transport = ScriptedTransport(never)
    async with GymClient.over(transport) as client:
        with anyio.move_on_after(0.05) as scope:
            async with client.rollouts(tasks(5)) as stream:
                async for _ in stream:
                    pass
    assert scope.cancelled_caught
    assert transport.running == 0


async def test_a_slow_consumer_slows_admission() -> None:
    taken = 0

    def source() -> Iterator[Task]:
        nonlocal taken
        for task in tasks(1000):
            taken += 1
            yield task

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        async with client.rollouts(source(), limits=Limits(concurrency=4)) as stream:
            await stream.__anext__()
            await anyio.sleep(0.05)
            assert taken <= 7


async def test_two_streams_share_one_loop() -> None:
    async def count(client: GymClient, into: list[int]) -> None:
        into.append(len((await client.collect(tasks(10))).groups))

    found: list[int] = []
    async with (
        GymClient.over(ScriptedTransport(jittery)) as one,
        GymClient.over(ScriptedTransport(jittery)) as two,
        anyio.create_task_group() as group,
    ):
        group.start_soon(count, one, found)
        group.start_soon(count, two, found)
    assert found == [10, 10]


async def test_asynchronous_sources_and_texts() -> None:
    async def source() -> AsyncIterator[str]:
        for n in range(3):
            yield f"question {n}"

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        collection = await client.collect(source())
    assert [group.task.id for group in collection.groups] == ["task-000000", "task-000001", "task-000002"]


async def test_a_source_that_fails_loses_nothing() -> None:
    def source() -> Iterator[Task]:
        yield from tasks(3)
        raise DatasetError("not JSON", path="tasks.jsonl", line=4)

    groups = []
    async with GymClient.over(ScriptedTransport(jittery)) as client:
        with pytest.raises(DatasetError, match=r"tasks\.jsonl:4"):
            async with client.rollouts(source()) as stream:
                async for group in stream:
                    groups.append(group)  # noqa: PERF401
    assert len(groups) == 3


async def test_misuse_of_a_stream() -> None:
    async with GymClient.over(ScriptedTransport(in_turn())) as client:
        with pytest.raises(ConfigurationError, match=r"use \[task\]"):
            client.rollouts("q")
        with pytest.raises(ConfigurationError, match="group_size"):
            client.rollouts(["q"], group_size=0)
        with pytest.raises(ConfigurationError, match="enter the stream first"):
            await client.rollouts(["q"]).__anext__()
        with pytest.raises(ConfigurationError, match="two tasks of one stream"):
            await client.collect([Task("a", id="x"), Task("b", id="x")])


async def test_no_task_is_no_group() -> None:
    async with GymClient.over(ScriptedTransport(in_turn()), retry=Retry()) as client:
        collection = await client.collect([])
    assert collection.groups == []
    assert collection.mean_reward is None


async def test_cancelled_rollouts_are_not_delivered_but_finished_ones_are_stored(tmp_path: Path) -> None:
    async def slow(request: ResponseRequest) -> Any:
        if request.input[0].text == "question 1":  # type: ignore[union-attr]
            await anyio.sleep_forever()
        return say("x")

    store = tmp_path / "r.jsonl"
    async with GymClient.over(ScriptedTransport(slow)) as client:
        async with client.rollouts(tasks(2), group_size=2, store=store) as stream:
            await stream.__anext__()
    assert [rollout.outcome for rollout in read_rollouts(store)] == [Outcome.COMPLETED] * 2


async def test_a_damaged_store_names_file_and_line(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    async with GymClient.over(ScriptedTransport(jittery)) as client:
        await client.collect(tasks(2), store=store)
    with store.open("ab") as file:
        file.write(b'{"id": "ro_x"\n')
    with pytest.raises(StoreError, match=r"r\.jsonl:3: not a rollout"):
        list(read_rollouts(store))
    with pytest.raises(StoreError, match="cannot be read"):
        list(read_rollouts(tmp_path / "missing.jsonl"))


async def test_the_progress_bar_counts_rewards_and_failures(capfd: pytest.CaptureFixture[str]) -> None:
    def script(request: ResponseRequest) -> Any:
        text = request.input[0].text  # type: ignore[union-attr]
        return PolicyError("refused") if text == "question 3" else say("x")

    async with GymClient.over(ScriptedTransport(script)) as client:
        await client.collect(tasks(4), group_size=2, verifier=index_is_even, progress=True)
    shown = capfd.readouterr().err
    assert "8/8" in shown
    assert "reward=0.500" in shown
    assert "failed=2" in shown


async def test_pass_at_k() -> None:
    assert pass_at_k(1, 4, 1) == 0.25
    assert pass_at_k(1, 4, 4) == 1.0
    assert pass_at_k(2, 4, 2) == pytest.approx(1 - 1 / 6)
    with pytest.raises(ValueError, match="k"):
        pass_at_k(1, 2, 3)
