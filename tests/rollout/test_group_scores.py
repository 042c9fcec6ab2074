"""Group verifiers in a stream: what they replace, what their failure means, what is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.scripted import ScriptedTransport, say

from gym_sdk import Deadlines, GymClient, Limits, Outcome, Reward, Rollout, Task
from gym_sdk.environments import Environment
from gym_sdk.errors import PolicyError
from gym_sdk.rollout import DynamicSampling, read_rollouts
from gym_sdk.schema import FailureKind, Stage
from gym_sdk.store import Journal

pytestmark = pytest.mark.asyncio


def tasks(count: int) -> list[Task]:
    return [Task(f"q{n}", id=f"q{n}") for n in range(count)]


def saying() -> ScriptedTransport:
    return ScriptedTransport(lambda request: say("x"))


async def own(rollout: Rollout) -> float:
    return 0.5


async def by_rank(rollouts: Sequence[Rollout]) -> list[Reward]:
    return [Reward(value=float(place), components={"rank": 1.0}) for place in range(len(rollouts))]


async def test_it_replaces_the_rewards_and_keeps_the_verifiers_own() -> None:
    async with GymClient.over(saying()) as client:
        environment = Environment(verifier=own, group_verifier=by_rank)
        collection = await client.collect(tasks(3), group_size=3, environment=environment)
        only = await client.collect(tasks(1), environment=Environment(group_verifier=by_rank))
    for group in collection.groups:
        assert group.rewards == [0.0, 1.0, 2.0]
        assert group.rollouts[0].reward_components == {"rank": 1.0, "verifier": 0.5}
    assert only.groups[0].rollouts[0].reward_components == {"rank": 1.0}


async def test_it_sees_what_came_to_an_end_and_the_rest_stays_failed() -> None:
    answers = iter([PolicyError("no"), say("x"), say("x")])
    seen: list[int] = []

    async def look(rollouts: Sequence[Rollout]) -> list[float]:
        seen.extend(rollout.index for rollout in rollouts)
        return [1.0] * len(rollouts)

    async with GymClient.over(ScriptedTransport(lambda request: next(answers))) as client:
        environment = Environment(group_verifier=look)
        (group,) = (await client.collect(tasks(1), group_size=3, environment=environment)).groups
    assert seen == [1, 2]
    assert [rollout.reward for rollout in group.rollouts] == [None, 1.0, 1.0]


async def raising(rollouts: Sequence[Rollout]) -> list[float]:
    raise ZeroDivisionError


async def too_few(rollouts: Sequence[Rollout]) -> list[float]:
    return [1.0]


async def hanging(rollouts: Sequence[Rollout]) -> list[float]:
    await asyncio.sleep(60)
    return []


@pytest.mark.parametrize(
    ("verifier", "kind"),
    [
        (raising, FailureKind.VERIFIER),
        (too_few, FailureKind.VERIFIER),
        (hanging, FailureKind.DEADLINE),
    ],
)
async def test_if_it_fails_all_of_them_fail(verifier: Any, kind: FailureKind, tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    async with GymClient.over(saying()) as client:
        environment = Environment(verifier=own, group_verifier=verifier)
        deadlines = Deadlines(verifier_s=0.05)
        (group,) = (
            await client.collect(
                tasks(1), group_size=2, environment=environment, deadlines=deadlines, store=store
            )
        ).groups
    for rollout in [*group.rollouts, *read_rollouts(store)]:
        assert rollout.outcome is Outcome.FAILED
        assert rollout.reward is None
        assert rollout.failure is not None
        assert (rollout.failure.where, rollout.failure.kind) == (Stage.GROUP_VERIFIER, kind)


async def test_it_shares_the_limit_of_the_verifiers() -> None:
    running = most = 0

    async def counted(rollouts: Sequence[Rollout]) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return [1.0] * len(rollouts)

    async with GymClient.over(saying()) as client:
        environment = Environment(group_verifier=counted)
        await client.collect(tasks(20), environment=environment, limits=Limits(verifiers=2))
    assert most == 2


async def test_a_refilled_group_is_scored_again_with_its_own_rewards() -> None:
    sizes: list[int] = []
    owns: list[float | None] = []

    async def flat_at_first(rollouts: Sequence[Rollout]) -> list[float]:
        sizes.append(len(rollouts))
        owns.extend(rollout.reward for rollout in rollouts)
        return [1.0] * 2 if len(rollouts) == 2 else [0.0, 0.0, 1.0]

    async with GymClient.over(saying()) as client:
        async with asyncio.timeout(5):
            (group,) = (
                await client.collect(
                    tasks(1),
                    group_size=2,
                    environment=Environment(verifier=own, group_verifier=flat_at_first),
                    dynamic=DynamicSampling(refill=1),
                    limits=Limits(concurrency=1),
                )
            ).groups
    assert sizes == [2, 3]
    assert owns == [0.5] * 5
    assert group.rewards == [0.0, 0.0, 1.0]
    assert group.rollouts[0].reward_components == {"verifier": 0.5}


async def test_groups_are_stored_once_scored_and_not_scored_again(tmp_path: Path) -> None:
    store, calls = tmp_path / "r.jsonl", 0

    async def counted(rollouts: Sequence[Rollout]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            await asyncio.sleep(60)
        return [1.0] * len(rollouts)

    environment = Environment(verifier=own, group_verifier=counted)
    transport = saying()
    async with GymClient.over(transport) as client:
        async with client.rollouts(tasks(2), group_size=2, environment=environment, store=store) as stream:
            first = await anext(stream)
        assert len(list(read_rollouts(store))) == 2
        groups = (await client.collect(tasks(2), group_size=2, environment=environment, store=store)).groups
    assert calls == 3
    assert len(transport.requests) == 6
    assert groups[0].rollouts == first.rollouts
    assert len(list(read_rollouts(store))) == 4


async def test_half_a_stored_group_is_scored_as_a_whole(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    environment = Environment(verifier=own, group_verifier=by_rank)
    async with GymClient.over(saying()) as client:
        (whole,) = (await client.collect(tasks(1), group_size=3, environment=environment)).groups
        with Journal(store) as journal:  # killed between two lines
            journal.write(whole.rollouts[1])
        (group,) = (await client.collect(tasks(1), group_size=3, environment=environment, store=store)).groups
    assert group.rewards == [0.0, 1.0, 2.0]
    assert all(r.reward_components == {"rank": 1.0, "verifier": 0.5} for r in group.rollouts)
    assert group.rollouts[1].id == whole.rollouts[1].id
