"""Groups: whole and in order; spares, early stops, refills, and groups that are dropped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.by_hand import ByHand
from support.held import until
from support.scripted import ScriptedTransport, say

from gym_sdk import GymClient, Limits, Outcome, Rollout, Task
from gym_sdk.errors import ConfigurationError, GymError, PolicyError
from gym_sdk.rollout import DynamicSampling
from gym_sdk.rollout.beginning import empty_rollout
from gym_sdk.rollout.groups import OpenGroup, is_flat
from gym_sdk.schema import Cancellation, Group, Stage

pytestmark = pytest.mark.asyncio


async def number_said(rollout: Rollout) -> float:
    return float(rollout.output_text)


def tasks(count: int) -> list[Task]:
    return [Task(f"q{n}", id=f"q{n}") for n in range(count)]


def indices(group: Group) -> list[int]:
    return [rollout.index for rollout in group.rollouts]


async def taken(stream: Any) -> Group:
    async with asyncio.timeout(5):
        group: Group = await anext(stream)
    return group


async def test_the_first_group_to_finish_comes_first_and_its_rollouts_by_index() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(2), group_size=3, verifier=number_said) as stream:
            calls = await hand.arrived(6)
            for place in (5, 0, 3, 4):
                calls[place].answer(str(place))
            group = await taken(stream)
            assert group.task.id == "q1"
            assert indices(group) == [0, 1, 2]
            assert group.rewards == [3.0, 4.0, 5.0]


async def test_stragglers_are_cancelled_in_the_transport_and_not_waited_for() -> None:
    hand = ByHand()
    transport = ScriptedTransport(hand)
    async with GymClient.over(transport) as client:
        async with client.rollouts(
            tasks(1), group_size=2, verifier=number_said, dynamic=DynamicSampling(spare=2)
        ) as stream:
            calls = await hand.arrived(4)
            calls[3].answer("3")
            calls[1].answer("1")
            group = await taken(stream)
            await until(lambda: transport.running == 0)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
    assert indices(group) == [1, 3]
    assert [call.cancelled for call in calls] == [True, False, True, False]


async def test_a_straggler_that_will_not_end_does_not_hold_its_group_back() -> None:
    stubborn = asyncio.Event()

    async def verify(rollout: Rollout) -> float:
        if rollout.index == 0:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await stubborn.wait()
                raise
        return 1.0

    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        async with client.rollouts(
            tasks(1), group_size=1, verifier=verify, dynamic=DynamicSampling(spare=1)
        ) as stream:
            assert indices(await taken(stream)) == [1]
            assert not stubborn.is_set()
            stubborn.set()


async def test_spares_stand_in_for_what_failed() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(
            tasks(1), group_size=2, verifier=number_said, dynamic=DynamicSampling(spare=1)
        ) as stream:
            calls = await hand.arrived(3)
            calls[0].answer(PolicyError("no"))
            calls[1].answer("1")
            calls[2].answer("2")
            group = await taken(stream)
    assert indices(group) == [1, 2]
    assert group.rewards == [1.0, 2.0]


async def test_failed_ones_are_delivered_where_spares_are_not_enough() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(
            tasks(1), group_size=2, verifier=number_said, dynamic=DynamicSampling(spare=1)
        ) as stream:
            calls = await hand.arrived(3)
            for call, answer in zip(calls, (PolicyError("no"), PolicyError("never"), "2"), strict=True):
                call.answer(answer)
            group = await taken(stream)
    assert indices(group) == [0, 2]
    assert [rollout.reward for rollout in group.rollouts] == [None, 2.0]


async def test_a_group_without_variance_so_far_is_stopped() -> None:
    hand = ByHand()
    transport = ScriptedTransport(hand)
    async with GymClient.over(transport) as client:
        async with client.rollouts(
            tasks(1), group_size=6, verifier=number_said, dynamic=DynamicSampling(stop_flat_after=3)
        ) as stream:
            calls = await hand.arrived(6)
            calls[0].answer("1")
            calls[5].answer("0")
            await asyncio.sleep(0.01)
            calls[1].answer("1")
            calls[2].answer("1")
            group = stream.__anext__()
            for call in calls:
                call.answer("1")
            assert len((await group).rollouts) == 6  # one of them differs: it goes on

        hand.calls.clear()
        async with client.rollouts(
            tasks(1), group_size=6, verifier=number_said, dynamic=DynamicSampling(stop_flat_after=3)
        ) as stream:
            calls = await hand.arrived(6)
            for place in (4, 1, 3):
                calls[place].answer("1")
            assert indices(await taken(stream)) == [1, 3, 4]
            await until(lambda: transport.running == 0)
    assert sum(call.cancelled for call in calls) == 3


async def test_a_flat_group_is_refilled_once_with_indices_of_its_own() -> None:
    hand = ByHand()
    dynamic = DynamicSampling(spare=1, refill=2)
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(1), group_size=2, verifier=number_said, dynamic=dynamic) as stream:
            calls = await hand.arrived(3)
            calls[0].answer("1")
            calls[1].answer("1")  # 2 is a straggler
            calls = await hand.arrived(5)
            calls[3].answer("1")
            calls[4].answer("0")
            group = await taken(stream)
    assert indices(group) == [0, 1, 3, 4]
    assert group.rewards == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("concurrency", [1, 3, 16])
async def test_a_consumer_of_n_groups_gets_n_with_variance(concurrency: int) -> None:
    answers = iter(range(10_000))

    def script(request: Any) -> Any:
        place = int(request.input[0].text[1:])
        return say(str(next(answers) % 2 if place % 3 == 0 else 1))

    transport = ScriptedTransport(script)
    dynamic = DynamicSampling(flat="drop", refill=1)
    limits = Limits(concurrency=concurrency)
    async with GymClient.over(transport) as client:
        async with client.rollouts(
            tasks(60), group_size=2, verifier=number_said, dynamic=dynamic, limits=limits
        ) as stream:
            groups = [await taken(stream) for _ in range(5)]
    assert all(not is_flat(group.rollouts) for group in groups)
    assert stream.dropped >= 5
    assert transport.most_running <= concurrency


async def test_dropping_for_ever_ends_with_an_error() -> None:
    dynamic = DynamicSampling(flat="drop", max_dropped=5)
    async with GymClient.over(ScriptedTransport(lambda request: say("1"))) as client:
        with pytest.raises(GymError, match="5 groups in a row had the same reward"):
            async with client.rollouts(
                tasks(100), group_size=2, verifier=number_said, dynamic=dynamic
            ) as stream:
                await taken(stream)


@pytest.mark.parametrize(
    "wrong", [{"spare": -1}, {"refill": -1}, {"stop_flat_after": 1}, {"flat": "x"}, {"max_dropped": 0}]
)
async def test_what_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"DynamicSampling.{next(iter(wrong))}"):
        DynamicSampling(**wrong)


# a group against a model of it, and whole streams under any order of finishing


def ended(task: Task, index: int, reward: float | None) -> Rollout:
    rollout = empty_rollout(task, index, 0)
    rollout.reward = reward
    return rollout if reward is not None else rollout.fail(PolicyError("no"), Stage.MODEL_CALL)


@given(
    size=st.integers(1, 4),
    spare=st.integers(0, 3),
    refill=st.integers(0, 2),
    stop=st.none() | st.integers(2, 3),
    draw=st.data(),
)
@settings(deadline=None, max_examples=150)
async def test_a_group_keeps_to_its_rules(
    size: int, spare: int, refill: int, stop: int | None, draw: st.DataObject
) -> None:
    task = Task("q", id="q")
    dynamic = DynamicSampling(spare=spare, refill=refill, stop_flat_after=stop)
    group = OpenGroup(task, 0, 0, size, dynamic)
    started = group.start()
    assert started == list(range(size + spare))
    refills = 0
    while True:
        while not group.is_done:
            index = draw.draw(st.sampled_from(sorted(group.running)))
            group.finish(index, ended(task, index, draw.draw(st.sampled_from([None, 0.0, 1.0]))))
            rewards = [rollout.reward for rollout in group.done.values() if rollout.reward is not None]
            if len(rewards) >= group.size:
                assert group.surplus is Cancellation.STRAGGLER
            elif stop and not refills and len(rewards) >= stop and len(set(rewards)) == 1:
                assert group.surplus is Cancellation.FLAT
            else:
                assert group.surplus is None
            if group.surplus is not None:
                group.running.clear()
        more = group.refill()
        if not more:
            break
        refills += 1
        assert len(more) == refill
        assert min(more) >= size + spare  # never an index that was cancelled
    assert refills <= 1
    chosen = group.chosen()
    assert [rollout.index for rollout in chosen] == sorted(rollout.index for rollout in chosen)
    assert len(chosen) <= group.size
    finished_first = [rollout for rollout in group.done.values() if rollout.ok][: group.size]
    assert {rollout.index for rollout in finished_first} <= {rollout.index for rollout in chosen}


@given(
    group_size=st.integers(1, 3),
    dynamic=st.builds(
        DynamicSampling,
        spare=st.integers(0, 2),
        refill=st.integers(0, 2),
        stop_flat_after=st.sampled_from([None, 2]),
        flat=st.sampled_from(["deliver", "drop"]),
    ),
    concurrency=st.integers(1, 6),
    scored_together=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
async def test_all_groups_come_whatever_finishes_when(
    group_size: int, dynamic: DynamicSampling, concurrency: int, scored_together: bool, seed: int
) -> None:
    import random

    from gym_sdk.environments import Environment

    chance = random.Random(seed)

    async def script(request: Any) -> Any:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        return PolicyError("no") if chance.random() < 0.2 else say(str(chance.randrange(2)))

    async def together(rollouts: Any) -> list[float]:
        await asyncio.sleep(0)
        return [rollout.reward for rollout in rollouts]

    environment = Environment(verifier=number_said, group_verifier=together if scored_together else None)
    transport = ScriptedTransport(script)
    async with GymClient.over(transport) as client:
        async with asyncio.timeout(10):
            async with client.rollouts(
                tasks(8),
                group_size=group_size,
                environment=environment,
                dynamic=dynamic,
                limits=Limits(concurrency=concurrency),
            ) as stream:
                groups = [group async for group in stream]
                scheduler = stream._scheduler
                await until(lambda: not scheduler._flights)
                assert not scheduler._open
                assert not scheduler._pending
                assert scheduler._held == 0
    assert len(groups) + stream.dropped == 8
    assert len({group.task.id for group in groups}) == len(groups)
    assert transport.most_running <= concurrency
    for group in groups:
        assert all(rollout.outcome is not Outcome.CANCELLED for rollout in group.rollouts)
        assert len(set(indices(group))) == len(group.rollouts)
