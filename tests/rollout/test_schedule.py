"""Admission: order, epochs, ramp, look-ahead, backpressure, limits, several consumers, sources that block."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.by_hand import ByHand
from support.scripted import ScriptedTransport, call, say

from gym_sdk import GymClient, Limits, Rollout, Sampling, Task, tool
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError
from gym_sdk.rollout import Schedule
from gym_sdk.rollout.source import read_tasks
from gym_sdk.schema import Group, Response, ResponseRequest

pytestmark = pytest.mark.asyncio


def tasks(count: int) -> list[Task]:
    return [Task(f"q{n}", id=f"q{n}") for n in range(count)]


def answering() -> ScriptedTransport:
    return ScriptedTransport(lambda request: say("x"))


async def admitted(source: Any, schedule: Schedule) -> list[tuple[str | None, int]]:
    return [(task.id, epoch) async for task, epoch in read_tasks(source, schedule, {})]


async def ids_of(client: GymClient, source: Any, **options: Any) -> list[str | None]:
    """Return the ids in the order of admission: one at a time."""
    async with client.rollouts(source, limits=Limits(concurrency=1), **options) as stream:
        return [group.task.id async for group in stream]


async def test_priority_and_cost_and_a_function() -> None:
    source = [
        Task("four", id="a", metadata={"priority": 1}),
        Task("a very long one", id="b"),
        Task("x", id="c", metadata={"priority": 2, "cost": 99}),
        Task([{"role": "user", "content": "short"}], id="d", metadata={"priority": -1}),
    ]
    async with GymClient.over(answering()) as client:
        assert await ids_of(client, source) == ["a", "b", "c", "d"]
        assert await ids_of(client, source, schedule=Schedule(order="priority")) == ["c", "a", "b", "d"]
        assert (await ids_of(client, source, schedule=Schedule(order="cost")))[0] == "c"
        by_id = Schedule(order=lambda task: ord(task.id or ""))
        assert await ids_of(client, source, schedule=by_id) == ["d", "c", "b", "a"]


@given(
    priorities=st.lists(st.integers(0, 5), max_size=12),
    lookahead=st.integers(1, 6),
    epochs=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
async def test_the_best_of_the_window_goes_first(priorities: list[int], lookahead: int, epochs: int) -> None:
    source = [Task("q", id=str(n), metadata={"priority": p}) for n, p in enumerate(priorities)]
    expected = []
    for epoch in range(epochs):
        left = [(-priority, n) for n, priority in enumerate(priorities)]
        while left:
            best = min(left[:lookahead])
            left.remove(best)
            expected.append((str(best[1]), epoch))
    schedule = Schedule(order="priority", lookahead=lookahead, epochs=epochs)
    assert await admitted(source, schedule) == expected


async def test_epochs_have_keys_and_seeds_of_their_own() -> None:
    transport = answering()
    async with GymClient.over(transport) as client:
        collection = await client.collect(
            tasks(2), group_size=2, schedule=Schedule(epochs=2), sampling=Sampling(seed=1)
        )
    keys = [rollout.key for group in collection.groups for rollout in group.rollouts]
    assert keys == [(f"q{n}", epoch, index) for epoch in (0, 1) for n in (0, 1) for index in (0, 1)]
    assert len({request.seed for request in transport.requests}) == 8


async def test_a_source_that_repeats_its_tasks_says_which_time_it_is() -> None:
    """The same task twice in one stream; keys and seeds are those of a schedule's epochs."""
    transport = answering()
    again = [replace(task, epoch=epoch) for epoch in (0, 1) for task in tasks(2)]
    async with GymClient.over(transport) as client:
        collection = await client.collect(again, sampling=Sampling(seed=1))
        seeds = {request.seed for request in transport.requests}
        await client.collect(tasks(2), schedule=Schedule(epochs=2), sampling=Sampling(seed=1))
        assert {request.seed for request in transport.requests} == seeds
        with pytest.raises(ConfigurationError, match="two tasks of one stream have the id 'q0'"):
            await client.collect([again[2], again[2]])
    keys = [group.rollouts[0].key for group in collection.groups]
    assert keys == [(f"q{n}", epoch, 0) for epoch in (0, 1) for n in (0, 1)]
    assert len(seeds) == 4


async def test_a_stream_that_never_ends() -> None:
    async with GymClient.over(answering()) as client:
        async with client.rollouts(
            tasks(3), schedule=Schedule(epochs=None), limits=Limits(concurrency=4)
        ) as stream:
            groups = [await anext(stream) for _ in range(20)]
        assert max(group.epoch for group in groups) >= 5

        def endless() -> Iterator[Task]:
            number = 0
            while True:
                yield Task("q", id=str(number))
                number += 1

        source = endless()
        async with client.rollouts(source, limits=Limits(concurrency=4)) as stream:
            assert len({(await anext(stream)).task.id for _ in range(20)}) == 20
        assert next(source, None) is None  # it was closed


async def test_for_ever_over_nothing_ends() -> None:
    async with GymClient.over(answering()) as client:
        assert (await client.collect([], schedule=Schedule(epochs=None))).groups == []


async def test_sources_that_are_refused() -> None:
    async with GymClient.over(answering()) as client:
        with pytest.raises(ConfigurationError, match="read only once"):
            client.rollouts(iter(tasks(2)), schedule=Schedule(epochs=2))
        with pytest.raises(ConfigurationError, match="not int"):
            client.rollouts(3)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="a task must be a Task or text, not int"):
            await client.collect([3])  # type: ignore[list-item]

        class Changing:
            def __init__(self) -> None:
                self.times = 0

            def __iter__(self) -> Iterator[Task]:
                self.times += 1
                return iter(tasks(3) if self.times <= 2 else tasks(3)[::-1])

        with pytest.raises(ConfigurationError, match="another position"):
            await client.collect(Changing(), schedule=Schedule(epochs=2))


@pytest.mark.parametrize(
    "wrong", [{"order": "x"}, {"lookahead": 0}, {"epochs": 0}, {"ahead": 0}, {"ramp_s": -1.0}]
)
async def test_what_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"Schedule.{next(iter(wrong))}"):
        Schedule(**wrong)


async def test_concurrency_ramps_up() -> None:
    hand = ByHand()
    transport = ScriptedTransport(hand)
    async with GymClient.over(transport) as client:
        async with client.rollouts(
            tasks(50), schedule=Schedule(ramp_s=0.4), limits=Limits(concurrency=20)
        ) as stream:
            begun = asyncio.get_running_loop().time()
            await hand.arrived(1)
            seen = {transport.running}
            while transport.running < 20:
                elapsed_s = asyncio.get_running_loop().time() - begun
                assert transport.running <= max(1, 20 * (elapsed_s + 0.1) / 0.4)
                seen.add(transport.running)
                await asyncio.sleep(0.01)
            assert len(seen) >= 3
            for held in hand.calls:
                held.answer()
            await anext(stream)
    assert transport.most_running == 20


async def test_never_more_groups_ahead_than_asked_for() -> None:
    taken = 0
    most = 0
    given = 0

    def source() -> Iterator[Task]:
        nonlocal given, most
        for task in tasks(40):
            given += 1
            most = max(most, given - taken)
            yield task

    async with GymClient.over(answering()) as client:
        async with client.rollouts(source(), group_size=2, schedule=Schedule(ahead=3)) as stream:
            async for _ in stream:
                await asyncio.sleep(0)
                taken += 1
    assert taken == 40
    assert most <= 4  # the one in the consumer's hands counts as not taken here


async def test_a_slow_consumer_holds_admission_back() -> None:
    transport = answering()
    async with GymClient.over(transport) as client:
        async with client.rollouts(tasks(100), group_size=2, limits=Limits(concurrency=5)) as stream:
            for count in range(1, 6):
                await anext(stream)
                for _ in range(50):
                    await asyncio.sleep(0)
                assert len(transport.requests) <= 2 * (count + 5 + 1)


async def test_several_consumers_share_a_stream_and_all_come_to_its_end() -> None:
    seen: list[Group] = []

    async def consume(stream: Any) -> None:
        async for group in stream:
            seen.append(group)
            await asyncio.sleep(0)

    async with GymClient.over(answering()) as client:
        with anyio.fail_after(5):
            async with client.rollouts(tasks(30), limits=Limits(concurrency=3)) as stream:
                async with anyio.create_task_group() as group:
                    for _ in range(4):
                        group.start_soon(consume, stream)
    assert sorted(group.task.id or "" for group in seen) == sorted(f"q{n}" for n in range(30))


async def test_a_consumer_that_gives_up_passes_its_turn_on() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(2)) as stream:
            first = asyncio.create_task(stream.__anext__())
            second = asyncio.create_task(stream.__anext__())
            (await hand.arrived(2))[0].answer()
            while not stream._ready:
                await asyncio.sleep(0)  # it is first's, which has not run yet
            first.cancel()
            assert (await asyncio.wait_for(second, 5)).task.id == "q0"


async def test_other_consumers_end_when_the_stream_is_left() -> None:
    async def consume(stream: Any) -> int:
        return len([group async for group in stream])

    async with GymClient.over(ScriptedTransport(ByHand())) as client:
        async with client.rollouts(tasks(3)) as stream:
            consumers = [asyncio.create_task(consume(stream)) for _ in range(3)]
            await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.gather(*consumers), 5) == [0, 0, 0]


async def test_a_source_that_waits_is_waited_for_while_others_go_on() -> None:
    more = asyncio.Event()
    closed = False

    async def source() -> AsyncIterator[Task]:
        nonlocal closed
        try:
            yield tasks(1)[0]
            await more.wait()
            yield tasks(2)[1]
            await asyncio.sleep(60)
        finally:
            closed = True

    async with GymClient.over(answering()) as client:
        async with client.rollouts(source()) as stream:
            assert (await anext(stream)).task.id == "q0"
            more.set()
            assert (await anext(stream)).task.id == "q1"
    assert closed


async def test_an_asynchronous_generator_is_closed_wherever_it_stands() -> None:
    closed = False

    async def endless() -> AsyncIterator[str]:
        nonlocal closed
        try:
            while True:
                yield "q"
        finally:
            closed = True

    source = endless()
    async with GymClient.over(answering()) as client:
        async with client.rollouts(source, limits=Limits(concurrency=2)) as stream:
            await anext(stream)
    assert closed


async def test_each_limit_holds_for_itself() -> None:
    counts = {"tool": 0, "verifier": 0}
    most = {"tool": 0, "verifier": 0}

    async def busy(name: str) -> None:
        counts[name] += 1
        most[name] = max(most[name], counts[name])
        for _ in range(3):
            await asyncio.sleep(0)
        counts[name] -= 1

    @tool
    async def work() -> str:
        """Do something."""
        await busy("tool")
        return "done"

    async def verify(rollout: Rollout) -> float:
        await busy("verifier")
        return 1.0

    async def script(request: Any) -> Any:
        await asyncio.sleep(0)
        is_first = all(item.type == "message" for item in request.input)
        return call(("work", "{}"), ("work", "{}")) if is_first else say("x")

    transport = ScriptedTransport(script)
    limits = Limits(concurrency=20, model_calls=4, tool_calls=3, verifiers=2)
    environment = Environment(tools=[work], verifier=verify)
    async with GymClient.over(transport) as client:
        collection = await client.collect(tasks(30), environment=environment, limits=limits)
    assert all(group.rewards == [1.0] for group in collection.groups)
    assert transport.most_running == 4
    assert most == {"tool": 3, "verifier": 2}


async def test_older_groups_go_first_where_something_is_scarce() -> None:
    hand = ByHand()

    @tool
    async def work() -> str:
        """Do something."""
        return "done"

    async with GymClient.over(ScriptedTransport(hand)) as client:
        limits = Limits(concurrency=8, model_calls=1)
        async with client.rollouts(tasks(4), tools=[work], limits=limits) as stream:
            await hand.arrived(1)
            hand.calls[0].answer(call(("work", "{}")))  # q0 asks again, behind q1, q2 and q3
            await hand.arrived(2)
            hand.calls[1].answer()
            await hand.arrived(3)
            assert [held.text for held in hand.calls][2] == "q0"
            while len(hand.held):
                hand.held[0].answer()
                await asyncio.sleep(0.001)
            assert {(await anext(stream)).task.id for _ in range(4)} == {"q0", "q1", "q2", "q3"}


async def test_only_so_many_start_in_one_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_sdk.rollout.scheduler._STARTS_PER_TURN", 4)
    turn = 0
    starts: Counter[int] = Counter()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    def script(request: ResponseRequest) -> Response:
        starts[turn] += 1
        return say("x")

    counting = asyncio.create_task(count_turns())
    async with GymClient.over(ScriptedTransport(script)) as client:
        collection = await client.collect([f"q{n}" for n in range(40)], limits=Limits(concurrency=40))
    counting.cancel()
    assert len(collection.groups) == 40
    assert max(starts.values()) <= 8  # a count may come before or after the starts of its turn
