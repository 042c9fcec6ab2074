"""Rollouts whose weights are too old: cancelled and sampled anew, or marked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.by_hand import ByHand, said_with
from support.held import until
from support.scripted import ScriptedTransport, call

from gym_sdk import GymClient, Limits, Outcome, Rollout, Task, tool
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.rollout import DynamicSampling, Staleness, WeightClock
from gym_sdk.schema import Cancellation, Group

pytestmark = pytest.mark.asyncio


def tasks(count: int) -> list[Task]:
    return [Task(f"q{n}", id=f"q{n}") for n in range(count)]


async def taken(stream: Any) -> Group:
    async with asyncio.timeout(5):
        group: Group = await anext(stream)
    return group


async def test_what_is_in_flight_with_weights_too_old_is_sampled_anew() -> None:
    hand = ByHand()
    transport = ScriptedTransport(hand)
    async with GymClient.over(transport) as client:
        client.weights.advance("v1")
        async with client.rollouts(tasks(1), staleness=Staleness(1)) as stream:
            await hand.arrived(1)
            await client.update_weights("weights", version="v2")
            await asyncio.sleep(0.01)
            assert not hand.calls[0].cancelled  # one version behind: still good
            await client.update_weights("weights", version="v3")
            await hand.arrived(2)
            assert hand.calls[0].cancelled
            hand.calls[1].answer(said_with("x", "v3"))
            rollout = (await taken(stream)).rollouts[0]
    assert rollout.outcome is Outcome.COMPLETED
    assert rollout.metrics["staleness"] == 0.0
    assert transport.most_running == 1


async def test_a_finished_group_that_waited_too_long_is_sampled_anew() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(1), group_size=2, staleness=Staleness(0)) as stream:
            calls = await hand.arrived(2)
            calls[0].answer(said_with("x", "v1"))
            calls[1].answer(said_with("x", "v1"))
            await until(lambda: bool(stream._ready))
            client.weights.advance("v2")
            next_one = asyncio.create_task(taken(stream))
            for held in (await hand.arrived(4))[2:]:
                held.answer(said_with("y", "v2"))
            group = await next_one
    assert [rollout.output_text for rollout in group.rollouts] == ["y", "y"]
    assert [rollout.index for rollout in group.rollouts] == [0, 1]


async def test_a_finished_rollout_does_not_wait_for_its_group_to_be_sampled_anew() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        client.weights.advance("v1")
        async with client.rollouts(tasks(1), group_size=2, staleness=Staleness(0)) as stream:
            calls = await hand.arrived(2)
            calls[0].answer(said_with("x", "v1"))
            await until(lambda: len(stream._scheduler._flights) == 1)
            client.weights.advance("v2")
            for held in (await hand.arrived(4))[2:]:
                held.answer(said_with("y", "v2"))
            group = await taken(stream)
    assert calls[1].cancelled
    assert [rollout.output_text for rollout in group.rollouts] == ["y", "y"]


async def test_restarts_are_bounded_and_then_it_is_cancelled() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        client.weights.advance("v0")
        async with client.rollouts(tasks(1), staleness=Staleness(0, restarts=2)) as stream:
            for attempt in range(3):
                await hand.arrived(attempt + 1)
                client.weights.advance(f"v{attempt + 1}")
            rollout = (await taken(stream)).rollouts[0]
    assert len(hand.calls) == 3
    assert rollout.outcome is Outcome.CANCELLED
    assert rollout.cancellation is Cancellation.STALE
    assert rollout.reward is None


async def test_old_ones_are_delivered_with_a_mark() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        client.weights.advance("v1")
        async with client.rollouts(tasks(1), staleness=Staleness(0, too_old="mark")) as stream:
            await hand.arrived(1)
            client.weights.advance("v2")
            client.weights.advance("v3")
            hand.calls[0].answer(said_with("x", "v1", "v2"))
            rollout = (await taken(stream)).rollouts[0]
    assert rollout.outcome is Outcome.COMPLETED
    assert rollout.metrics["staleness"] == 2.0


async def test_a_version_that_nobody_told_of_counts_from_its_first_token() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(2), staleness=Staleness(0), limits=Limits(concurrency=2)) as stream:
            calls = await hand.arrived(2)
            calls[1].answer(said_with("x", "pushed by hand 1"))
            assert (await taken(stream)).task.id == "q1"
            client.weights.number_of("pushed by hand 2")  # a token of another stream, say
            await hand.arrived(3)
            assert calls[0].cancelled
            hand.calls[2].answer(said_with("y", "pushed by hand 2"))
            assert (await taken(stream)).rollouts[0].output_text == "y"


async def test_restarts_run_while_the_source_blocks() -> None:
    hand = ByHand()

    async def source() -> Any:
        yield tasks(1)[0]
        await asyncio.sleep(60)

    async with GymClient.over(ScriptedTransport(hand)) as client:
        client.weights.advance("v1")
        async with client.rollouts(source(), staleness=Staleness(0)) as stream:
            await hand.arrived(1)
            client.weights.advance("v2")
            await hand.arrived(2)
            hand.calls[1].answer(said_with("y", "v2"))
            assert (await taken(stream)).rollouts[0].output_text == "y"


async def test_stored_versions_are_not_news(tmp_path: Path) -> None:
    hand = ByHand()
    store = tmp_path / "r.jsonl"
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(2), store=store) as stream:
            for held, version in zip(await hand.arrived(2), ("a", "b"), strict=True):
                held.answer(said_with(version, version))
                await taken(stream)
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(2), store=store, staleness=Staleness(0)) as stream:
            said = {(await taken(stream)).rollouts[0].output_text for _ in range(2)}
        assert said == {"a", "b"}
        assert client.weights.now == 0


@given(st.lists(st.tuples(st.sampled_from(["advance", "see"]), st.sampled_from("abcd")), max_size=20))
async def test_the_clock_counts_updates(steps: list[tuple[str, str]]) -> None:
    clock = WeightClock()
    told: list[int] = []
    end = clock.listen(told.append)
    updates = 0
    numbers: dict[str, int] = {}
    seen_any = False
    for step, version in steps:
        if step == "advance":
            if numbers.get(version) != updates:
                updates += 1
                numbers[version] = updates
            clock.advance(version)
        else:
            if version not in numbers:
                updates += seen_any
                numbers[version] = updates if seen_any else 0
            seen_any = True
            assert clock.number_of(version) == numbers[version]
        assert clock.now == updates
        assert clock.known_number_of("never told of") is None
    assert told == list(range(1, updates + 1))
    end()
    clock.advance("another")
    assert len(told) == updates


async def test_a_cancelled_attempt_that_is_too_old_is_begun_anew(tmp_path: Path) -> None:
    hand, store = ByHand(), tmp_path / "r.jsonl"

    @tool
    async def look() -> str:
        """Look."""
        return "seen"

    async with GymClient.over(ScriptedTransport(hand)) as client:
        client.weights.advance("v1")
        options: dict[str, Any] = {"tools": [look], "store": store, "keep_partial": True}
        async with client.rollouts(tasks(1), **options):
            item = call(("look", "{}")).output[0]
            (await hand.arrived(1))[0].answer(said_with("", "v1", items=[item]))
            await hand.arrived(2)
        client.weights.advance("v2")
        async with client.rollouts(tasks(1), staleness=Staleness(1), **options):
            assert len((await hand.arrived(3))[2].request.input) == 3  # still good: it goes on
        client.weights.advance("v3")
        async with client.rollouts(tasks(1), staleness=Staleness(1), **options) as stream:
            (held,) = (await hand.arrived(4))[3:]
            assert len(held.request.input) == 1
            held.answer(said_with("x", "v3"))
            assert (await taken(stream)).rollouts[0].metrics["staleness"] == 0.0


async def test_a_restart_does_not_go_on_from_the_same_attempt(tmp_path: Path) -> None:
    hand, store = ByHand(), tmp_path / "r.jsonl"

    @tool
    async def look() -> str:
        """Look."""
        return "seen"

    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(1), tools=[look], store=store, keep_partial=True):
            (await hand.arrived(1))[0].answer(call(("look", "{}")))  # without versions
            await hand.arrived(2)
        async with client.rollouts(tasks(1), tools=[look], store=store, staleness=Staleness(0)):
            assert len((await hand.arrived(3))[2].request.input) == 3
            client.weights.advance("v1")
            assert len((await hand.arrived(4))[3].request.input) == 1


async def test_weights_that_change_while_a_group_is_scored() -> None:
    hand, scoring, go_on = ByHand(), asyncio.Event(), asyncio.Event()

    async def together(rollouts: Sequence[Rollout]) -> list[float]:
        scoring.set()
        await go_on.wait()
        return [float(place) for place in range(len(rollouts))]

    async with GymClient.over(ScriptedTransport(hand)) as client:
        client.weights.advance("v1")
        async with client.rollouts(
            tasks(1),
            group_size=2,
            environment=Environment(group_verifier=together),
            staleness=Staleness(0),
        ) as stream:
            for held in await hand.arrived(2):
                held.answer(said_with("x", "v1"))
            await scoring.wait()
            client.weights.advance("v2")
            await asyncio.sleep(0.01)
            assert len(hand.calls) == 2  # the group is looked at when it is taken
            go_on.set()
            next_one = asyncio.create_task(taken(stream))
            for held in (await hand.arrived(4))[2:]:
                held.answer(said_with("y", "v2"))
            group = await next_one
    assert [rollout.output_text for rollout in group.rollouts] == ["y", "y"]
    assert group.rewards == [0.0, 1.0]


@given(
    group_size=st.integers(1, 3),
    spare=st.integers(0, 1),
    most=st.integers(0, 1),
    concurrency=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=50)
async def test_all_groups_come_and_none_is_too_old_whenever_weights_change(
    group_size: int, spare: int, most: int, concurrency: int, seed: int
) -> None:
    chance = random.Random(seed)

    async def script(request: Any) -> Any:
        version = f"v{client.weights.now}"
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            client.weights.advance(f"v{client.weights.now + 1}")
        return PolicyError("no") if chance.random() < 0.1 else said_with("x", version)

    transport = ScriptedTransport(script)
    async with GymClient.over(transport) as client:
        client.weights.advance("v1")
        async with asyncio.timeout(10):
            async with client.rollouts(
                tasks(6),
                group_size=group_size,
                dynamic=DynamicSampling(spare=spare),
                staleness=Staleness(most, restarts=2),
                limits=Limits(concurrency=concurrency),
            ) as stream:
                groups = []
                async for group in stream:
                    groups.append(group)
                    for rollout in group.rollouts:
                        if rollout.outcome is Outcome.COMPLETED:
                            assert rollout.metrics["staleness"] <= most
                        elif rollout.outcome is Outcome.CANCELLED:
                            assert rollout.cancellation is Cancellation.STALE
                await until(lambda: not stream._scheduler._flights)
                assert not stream._scheduler._open
                assert stream._scheduler._held == 0
    assert {group.task.id for group in groups} == {f"q{n}" for n in range(6)}
    assert len(groups) == 6
    assert all(len(group.rollouts) == group_size for group in groups)
    assert transport.most_running <= concurrency


async def test_what_cannot_be() -> None:
    for wrong in ({"max_versions": -1}, {"restarts": -1}, {"too_old": "x"}):
        with pytest.raises(ConfigurationError, match=f"Staleness.{next(iter(wrong))}"):
            Staleness(**{"max_versions": 1, **wrong})  # type: ignore[arg-type]
