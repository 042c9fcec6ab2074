"""Leaving a stream with hundreds of rollouts in flight, in every way: the server sees all of them end."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.collecting import collected, leaving_nothing, look, questions, right
from support.collectors import collectors, order, output_of
from support.faulty_policy import Asked, Fault, FaultyPolicy, serving
from support.faulty_server import HOLD
from support.held import until

from gym_sdk import Deadlines, GymClient, Limits, Outcome, Sampling
from gym_sdk.errors import DeadlineError
from gym_sdk.rollout import RolloutStream
from gym_sdk.store import Journal, read_rollouts

pytestmark = pytest.mark.asyncio

MANY = 500


def hold_late_ones(asked: Asked) -> Fault:
    """The first four questions are answered; all others are being generated for ever."""
    return None if asked.question < 4 else [HOLD]


async def all_in_flight(policy: FaultyPolicy, stream: RolloutStream) -> None:
    await until(lambda: policy.in_flight >= MANY and stream.watch.rollouts == 4, 60)


async def leave(policy: FaultyPolicy, stream: RolloutStream) -> None:
    async with stream:
        await all_in_flight(policy, stream)


async def break_off(policy: FaultyPolicy, stream: RolloutStream) -> None:
    async with stream:
        await all_in_flight(policy, stream)
        async for _ in stream:
            break


async def raise_an_error(policy: FaultyPolicy, stream: RolloutStream) -> None:
    with pytest.raises(ZeroDivisionError):
        async with stream:
            await all_in_flight(policy, stream)
            raise ZeroDivisionError


async def be_cancelled(policy: FaultyPolicy, stream: RolloutStream) -> None:
    async def consume() -> None:
        async with stream:
            async for _ in stream:
                pass

    task = asyncio.create_task(consume())
    await all_in_flight(policy, stream)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def run_out_of_time(policy: FaultyPolicy, stream: RolloutStream) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as scope, stream:
            await all_in_flight(policy, stream)
            scope.reschedule(asyncio.get_running_loop().time())
            async for _ in stream:
                pass


@pytest.mark.parametrize("way", [leave, break_off, raise_an_error, be_cancelled, run_out_of_time])
async def test_leaving(way: Callable[[FaultyPolicy, RolloutStream], Awaitable[None]], tmp_path: Path) -> None:
    """All generations are aborted, while the client is still open; what was finished is in the store."""
    store = tmp_path / "r.jsonl"
    async with serving(hold_late_ones) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        stream = client.rollouts(
            questions(1000),
            tools=[look],
            verifier=right,
            store=store,
            # a finished group that nobody took holds a place
            limits=Limits(concurrency=MANY + 4),
        )
        async with asyncio.timeout(100):
            await way(policy, stream)
        await until(lambda: policy.in_flight == 0, 10)
        assert policy.aborted >= MANY
        idle = [connection for connection in policy.connections if connection.task is None]
        assert len(idle) == policy.open  # only connections that wait for their next request
        with Journal(store) as journal:
            assert len(journal) == 4
        policy.fault = lambda asked: None
        sampled = policy.samples
        await collected(client, store, count=10, group_size=1)
        assert policy.samples == sampled + 6 * 2


async def test_the_deadline_of_the_run(tmp_path: Path) -> None:
    """What had finished is delivered first."""
    store, delivered = tmp_path / "r.jsonl", []
    async with serving(hold_late_ones) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        with pytest.raises(DeadlineError, match=r"the run did not finish within its deadline of 1 s"):
            async with client.rollouts(
                questions(50), tools=[look], verifier=right, store=store, deadlines=Deadlines(run_s=1.0)
            ) as stream:
                async for group in stream:
                    delivered.append(group.task.id)  # noqa: PERF401
        await until(lambda: policy.in_flight == 0, 10)
    assert set(delivered) == {rollout.task_id for rollout in read_rollouts(store)}
    assert set(delivered) <= {f"task-{n:06d}" for n in range(4)}
    assert policy.aborted > 0


async def test_partial_rollouts_go_on(tmp_path: Path) -> None:
    """What was sampled before the stream was left is not sampled again."""
    store = tmp_path / "r.jsonl"

    def second_turns_hang(asked: Asked) -> Fault:
        return [HOLD] if asked.turn == 1 else None

    options: dict[str, Any] = {"tools": [look], "verifier": right, "store": store, "keep_partial": True}
    async with serving(second_turns_hang) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        async with client.rollouts(questions(20), **options):
            await until(lambda: policy.in_flight == 20, 30)
        partial = {rollout.key: rollout for rollout in read_rollouts(store)}
        assert {rollout.outcome for rollout in partial.values()} == {Outcome.CANCELLED}
        assert {rollout.reward for rollout in partial.values()} == {None}
        assert policy.samples == 40
        policy.fault = lambda asked: None
        collection = await collected(client, store, count=20, group_size=1, keep_partial=True)
        assert policy.samples == 60
    for rollout in collection.rollouts:
        assert rollout.outcome is Outcome.COMPLETED
        assert rollout.model_calls[0].response_id == partial[rollout.key].model_calls[0].response_id


@pytest.mark.parametrize(
    ("name", "stops_on_signals", "says"),
    [
        ("SIGINT", False, [b"interrupted\n", b"ended with 0\n"]),
        ("SIGINT", True, [b"stopped by SIGINT\n", b"ended with 0\n"]),
        ("SIGTERM", False, [b"ended with -15\n"]),
        ("SIGTERM", True, [b"stopped by SIGTERM\n", b"ended with 0\n"]),
        ("SIGKILL", False, [b"killed\n"]),
    ],
)
async def test_a_process_that_is_told_to_end(
    name: str, stops_on_signals: bool, says: list[bytes], tmp_path: Path
) -> None:
    """With model calls in flight and verifiers in processes of their own, which have children, too."""
    store = tmp_path / "r.jsonl"
    with collectors() as process:
        async with output_of(process) as reader, serving(hold_late_ones) as policy, asyncio.timeout(60):
            order(
                process,
                url=policy.url,
                store=str(store),
                count=1000,
                group_size=1,
                concurrency=104,
                in_processes=True,
                stops_on_signals=stops_on_signals,
            )
            collector = psutil.Process(int(await reader.readline()))
            # both workers hang, each with a child of its own
            await until(lambda: policy.in_flight == 100 and len(collector.children(recursive=True)) == 4, 30)
            family = collector.children(recursive=True)
            collector.send_signal(getattr(signal, name))
            said = [line async for line in _until_ended(reader)]
            await until(lambda: policy.open == 0 and policy.aborted == 100, 10)
            await until(lambda: not any(map(_is_alive, family)), 10)
    assert said == says
    with Journal(store) as journal:  # nobody holds its lock, and it can be read
        assert len(journal) == 0


async def _until_ended(reader: asyncio.StreamReader) -> Any:
    async for line in reader:
        assert not line.startswith(b"["), json.loads(line)
        yield line
        if line.startswith((b"ended", b"killed")):
            return


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def test_the_embedded_engine_stops(untrained_policy: Path, tmp_path: Path) -> None:
    """Leaving the stream ends the sequences that are being generated; the engine serves the next stream."""
    async with leaving_nothing():
        async with GymClient.local(untrained_policy, device="cpu") as client:
            engine = client.transport.policy.engine  # type: ignore[attr-defined]
            # slow enough that they are seen in progress
            engine._scheduler.module.register_forward_pre_hook(lambda *_: time.sleep(0.004))
            async with client.rollouts(["a", "b", "c"], group_size=2):
                await until(lambda: sum(len(s.token_ids) >= 3 for s in engine._requests.values()) == 6, 60)
            await until(lambda: not engine._requests, 10)
            collection = await client.collect(["a"], sampling=Sampling(max_output_tokens=4))
    assert [rollout.outcome for rollout in collection.rollouts] in ([Outcome.COMPLETED], [Outcome.TRUNCATED])


async def test_a_taker_that_is_cancelled_just_when_it_is_woken() -> None:
    """Both happen in one turn of the loop; what it would have taken is there for the next one."""
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        async with client.rollouts(questions(1), tools=[look], verifier=right) as stream:
            taker = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            taker.cancel()
            stream._wake_all()
            await asyncio.wait([taker])
            assert taker.cancelled()
            assert (await anext(stream)).rewards == [1.0]
