"""Servers that come back without their memory; replicas that die; weights that change meanwhile."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.collecting import (
    PATIENT,
    QUICK,
    Hold,
    check,
    collected,
    failed,
    leaving_nothing,
    questions,
    right,
)
from support.faulty_policy import Asked, Fault, always, policy_process, serving
from support.faulty_server import HOLD, answer
from support.held import until

from gym_sdk import Deadlines, Group, GymClient, Limits, Retry
from gym_sdk.rollout import Staleness
from gym_sdk.schema import FailureKind, Stage
from gym_sdk.store import read_rollouts
from gym_sdk.transport import Breaker

pytestmark = pytest.mark.asyncio


async def test_a_server_process_that_is_killed_and_started_again(tmp_path: Path) -> None:
    """The new one at the same port remembers nothing: each conversation is told to it once, as a whole."""
    store, groups, life, hold = tmp_path / "r.jsonl", list[Group](), 0, Hold(1, 2)
    async with leaving_nothing():
        with ExitStack() as stack:
            server = stack.enter_context(policy_process())
            async with GymClient(server.url, retry=QUICK, breaker=PATIENT) as client:
                stream = client.rollouts(
                    questions(40),
                    group_size=2,
                    tools=[hold.look],
                    verifier=right,
                    store=store,
                    limits=Limits(concurrency=16),
                )
                async with stream, asyncio.timeout(60):
                    async for group in stream:
                        groups.append(group)
                        if len(groups) in (5, 15, 25):
                            await until(lambda: hold.waiting == 4, 30)  # between their turns
                            life += 1
                            server.process.kill()
                            server.process.wait()
                            # it takes a while until it is back
                            again = policy_process(server.port, life=life)
                            server = await asyncio.to_thread(stack.enter_context, again)
                            hold.release.set()
    lost = stream.watch.lost_states
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    check(rollouts, store, count=40, group_size=2)
    assert not [rollout for rollout in rollouts if rollout.failure is not None]
    assert lost >= 4
    assert lost == sum(rollout.metrics.get("lost_states", 0.0) for rollout in rollouts)


async def test_a_memory_that_is_lost_again_and_again(tmp_path: Path) -> None:
    """Also in the middle of a call's tries; the tokens stay one row."""

    async def script(asked: Asked) -> Fault:
        if asked.turn < 0:
            return None
        if asked.number % 3 == 0:
            policy.memory.clear()
        return answer({}, status="503 Starting") if asked.number % 7 == 0 else None

    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=Retry(20, 0.005, 0.01), breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=20)
    assert not collection.failures
    assert sum(rollout.metrics.get("lost_states", 0.0) for rollout in collection.rollouts) > 0
    assert all(rollout.metrics.get("forks", 0.0) == 0 for rollout in collection.rollouts)


async def test_a_server_that_never_remembers(tmp_path: Path) -> None:
    def script(asked: Asked) -> Fault:
        policy.memory.clear()
        return None

    async with serving(script) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        collection = await collected(client, tmp_path / "r.jsonl")
    assert not collection.failures
    assert {rollout.metrics["lost_states"] for rollout in collection.rollouts} == {1.0}


async def test_a_server_that_denies_even_the_whole(tmp_path: Path) -> None:
    error = {"message": "Previous response not found.", "code": "previous_response_not_found"}
    script = always(lambda asked: answer({"error": error}, status="400 Bad Request") if asked.turn else None)
    async with serving(script) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        collection = await collected(client, tmp_path / "r.jsonl")
    found = failed(
        collection, FailureKind.REFUSED, Stage.MODEL_CALL, policy.url, "Previous response not found"
    )
    assert len(found) == 12
    assert policy.samples == 12 * 3  # once more as a whole, and not again


async def test_a_replica_of_two_that_dies(tmp_path: Path) -> None:
    """Its groups go on at the other one, which is told their whole history once; no answer is lost."""
    store, hold = tmp_path / "r.jsonl", Hold(2, 3, 4, 5)  # two at each
    async with serving(latency_s=0.005) as one, serving(latency_s=0.005, samples=10**6) as two:
        async with leaving_nothing(one, two):
            async with GymClient([one.url, two.url], retry=QUICK, breaker=PATIENT) as client:
                stream = client.rollouts(
                    questions(30),
                    group_size=4,
                    tools=[hold.look],
                    verifier=right,
                    store=store,
                    limits=Limits(concurrency=24),
                )
                groups: list[Group] = []
                async with stream, asyncio.timeout(60):
                    async for group in stream:
                        groups.append(group)
                        if len(groups) == 5:
                            await until(lambda: hold.waiting == 16, 30)
                            await one.stop()
                            served = one.samples
                            hold.release.set()
                health = {replica.name: replica for replica in client.health()}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    check(rollouts, store, count=30, group_size=4)
    assert not [rollout for rollout in rollouts if rollout.failure is not None]
    assert one.samples == served > 0
    assert health[one.url].state == "open"
    assert health[two.url].state == "closed"
    assert stream.watch.lost_states > 0
    assert stream.watch.forks == stream.watch.unreported_forks == 0


async def test_a_replica_of_two_that_hangs(tmp_path: Path) -> None:
    """It accepts and is silent: each try there runs out of time, and is made again at the other one."""
    async with serving() as one, serving(samples=10**6) as two, leaving_nothing(one, two):
        one.fault = lambda asked: [HOLD]
        one.is_well = False
        async with GymClient([one.url, two.url], retry=QUICK, breaker=PATIENT) as client:
            deadlines = Deadlines(model_call_s=0.3)
            collection = await collected(client, tmp_path / "r.jsonl", deadlines=deadlines)
    assert not collection.failures
    assert one.aborted == one.samples


async def test_both_replicas_die(tmp_path: Path) -> None:
    async with serving() as one, serving(samples=10**6) as two:
        await one.stop()
        await two.stop()
        breaker = Breaker(probe_s=0.02, max_probe_s=0.05, patience_s=0.3)
        async with leaving_nothing(), GymClient([one.url, two.url], retry=QUICK, breaker=breaker) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert len(failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL)) == 12
    said = {rollout.failure.message for rollout in collection.failures if rollout.failure}
    assert any(one.url in message and two.url in message for message in said)


async def test_a_replica_that_comes_and_goes(tmp_path: Path) -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)

    async def flicker() -> None:
        while True:
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            await one.stop()
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            await one.start()

    async with serving(latency_s=0.002) as one, serving(latency_s=0.002, samples=10**6) as two:
        async with leaving_nothing(one, two):
            async with GymClient([one.url, two.url], retry=Retry(10, 0.01, 0.05), breaker=PATIENT) as client:
                flickering = asyncio.create_task(flicker())
                collection = await collected(
                    client, tmp_path / "r.jsonl", count=100, limits=Limits(concurrency=16)
                )
                flickering.cancel()
                await asyncio.wait([flickering])
    assert not collection.failures, f"seed {seed}"


async def test_weights_that_change_in_the_middle_of_rollouts(tmp_path: Path) -> None:
    """Each token says which weights sampled it; marked rollouts are delivered, with both in one row."""
    store, groups, hold = tmp_path / "r.jsonl", list[Group](), Hold(2)
    async with serving(latency_s=0.003) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        stream = client.rollouts(
            questions(40),
            group_size=2,
            tools=[hold.look],
            verifier=right,
            store=store,
            limits=Limits(concurrency=8),
            staleness=Staleness(0, too_old="mark"),
        )
        async with stream:
            async for group in stream:
                groups.append(group)
                if len(groups) % 8 == 0:
                    await until(lambda: hold.waiting == 2, 30)
                    await client.update_weights(str(tmp_path), version=str(len(groups)))
                    hold.release.set()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    check(rollouts, store, count=40, group_size=2)
    mixed = 0
    for rollout in rollouts:
        versions = [span.version for call in rollout.model_calls for span in call.tokens.weight_versions]  # type: ignore[union-attr]
        assert len(versions) == 2
        mixed += versions[0] != versions[1]
        (row,) = rollout.sequences()
        assert [span.version for span in row.weight_versions if span.version in versions]
    assert mixed >= 2
    assert {rollout.metrics["staleness"] for rollout in rollouts} >= {0.0, 1.0}


async def test_rollouts_whose_weights_are_too_old_are_sampled_anew(tmp_path: Path) -> None:
    """They are cancelled on the server, too; each is delivered once, and is never older than it may be."""
    store, groups, hold = tmp_path / "r.jsonl", list[Group](), Hold(2)
    async with serving(latency_s=0.003) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        stream = client.rollouts(
            questions(30),
            group_size=2,
            tools=[hold.look],
            verifier=right,
            store=store,
            limits=Limits(concurrency=8),
            staleness=Staleness(0, restarts=100),
        )
        async with stream:
            async for group in stream:
                groups.append(group)
                assert {rollout.metrics["staleness"] for rollout in group.rollouts} == {0.0}
                if len(groups) % 10 == 0:
                    await until(lambda: hold.waiting >= 2, 30)
                    await client.update_weights(str(tmp_path), version=str(len(groups)))
                    hold.release.set()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    check(rollouts, store, count=30, group_size=2, resampled=True)
    assert policy.samples >= 122  # those two, at least
    assert len(list(read_rollouts(store))) == 60
