"""Collecting rollouts from a faulty policy, and checking that none was lost, doubled or scored wrongly."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from gym_sdk import GymClient, Outcome, Retry, Rollout, Task, tool
from gym_sdk.rollout import Collection
from gym_sdk.schema import FailureKind, RolloutKey, Stage
from gym_sdk.store import read_rollouts
from gym_sdk.transport import Breaker
from support.faulty_policy import PROMPT, TAIL, FaultyPolicy

QUICK = Retry(attempts=4, base_s=0.01, max_s=0.05)
IMPATIENT = Breaker(probe_s=0.02, max_probe_s=0.05, patience_s=0.3)
PATIENT = Breaker(probe_s=0.02, max_probe_s=0.05, patience_s=60.0)


@tool
async def look(number: int) -> str:
    """Look something up."""
    return str(number * 7)


class Hold:
    """The tool `look`, which waits for `release` where it is asked for one of these numbers."""

    def __init__(self, *numbers: int) -> None:
        self.release = asyncio.Event()
        self.waiting = 0
        """Calls that have begun to wait."""

        @tool
        async def look(number: int) -> str:
            """Look something up."""
            if number in numbers:
                self.waiting += 1
                await self.release.wait()
            return str(number * 7)

        self.look = look


async def right(rollout: Rollout) -> float:
    return float(rollout.output_text == f"answer {rollout.task.answer}")


def questions(count: int) -> list[Task]:
    return [Task(f"question {number}", answer=number * 7) for number in range(count)]


def keys(count: int, group_size: int) -> set[RolloutKey]:
    return {RolloutKey(f"task-{n:06d}", 0, index) for n in range(count) for index in range(group_size)}


async def collected(
    client: GymClient, store: Path, *, count: int = 6, group_size: int = 2, **options: Any
) -> Collection:
    """Collect groups into a store, and check them."""
    options = {"tools": [look], "verifier": right, **options}
    collection = await client.collect(questions(count), group_size=group_size, store=store, **options)
    check(collection.rollouts, store, count=count, group_size=group_size)
    return collection


def check(
    rollouts: Iterable[Rollout], store: Path, *, count: int, group_size: int, resampled: bool = False
) -> None:
    """Check that each rollout is there once, in the store as it was delivered, and scored as it deserves.

    Args:
        rollouts: what was delivered.
        store: the journal.
        count: of the tasks.
        group_size: rollouts of each.
        resampled: whether rollouts that had ended well were sampled anew.
    """
    rollouts = list(rollouts)
    expected = keys(count, group_size)
    assert Counter(rollout.key for rollout in rollouts) == dict.fromkeys(expected, 1)
    lines: dict[RolloutKey, list[Rollout]] = {}
    for line in read_rollouts(store, every=True):
        lines.setdefault(line.key, []).append(line)
    last = {key: found[-1] for key, found in lines.items()}
    if not resampled:  # only what has no reward is attempted, and stored, again
        assert {one.reward for found in lines.values() for one in found[:-1]} <= {None}
    assert {key: found.id for key, found in last.items()} == {rollout.key: rollout.id for rollout in rollouts}
    for rollout in rollouts:
        stored = last[rollout.key]
        assert (stored.outcome, stored.reward) == (rollout.outcome, rollout.reward)
        check_outcome(rollout)
    check_samples(rollouts)


def check_outcome(rollout: Rollout) -> None:
    """Check that a rollout has its true reward, or failed and has none."""
    if rollout.outcome is Outcome.COMPLETED:
        assert rollout.reward == 1.0, rollout
        assert rollout.failure is None
    else:
        assert rollout.outcome is Outcome.FAILED
        assert rollout.reward is None
        assert rollout.reward_components == {}
        assert rollout.failure is not None


def check_samples(rollouts: Iterable[Rollout]) -> None:
    """Check that each completed rollout is one row of its own answers, and none is trained on twice."""
    sampled: Counter[int] = Counter()
    for rollout in rollouts:
        if rollout.outcome is not Outcome.COMPLETED:
            continue
        (row,) = rollout.sequences()
        (prompt, question, one, tail, two) = row.token_ids
        assert (prompt, question, tail) == (PROMPT, rollout.task.answer // 7, TAIL)
        assert list(row.loss_mask) == [0, 0, 1, 0, 1]
        sampled.update((one, two))
    assert set(sampled.values()) <= {1}


def lines_by_key(store: Path) -> dict[tuple[str, int, int], list[str]]:
    """Return the lines of each key, in order."""
    lines: dict[tuple[str, int, int], list[str]] = {}
    for line in store.read_text().splitlines():
        data = json.loads(line)
        lines.setdefault((data["task"]["id"], data["epoch"], data["index"]), []).append(line)
    return lines


def failed(collection: Collection, kind: FailureKind, where: Stage, *said: str) -> list[Rollout]:
    """Return the rollouts that failed, and check what the user is told."""
    failures = collection.failures
    assert failures
    for rollout in failures:
        assert rollout.failure is not None
        assert (rollout.failure.kind, rollout.failure.where) == (kind, where), rollout.failure
        for words in said:
            assert words in rollout.failure.message, rollout.failure.message
    return failures


@asynccontextmanager
async def leaving_nothing(*policies: FaultyPolicy, timeout_s: float = 10.0) -> AsyncIterator[None]:
    """Check that what runs within has left no task, no connection and no process."""
    process = psutil.Process()
    tasks, children = asyncio.all_tasks(), set(process.children(recursive=True))
    yield
    async with asyncio.timeout(timeout_s):
        while any(policy.open or policy.in_flight for policy in policies):
            await asyncio.sleep(0.002)
        while left := asyncio.all_tasks() - tasks:
            await asyncio.wait(left, timeout=0.01)
        while set(process.children(recursive=True)) - children:
            await asyncio.sleep(0.005)
    ports = {policy.port for policy in policies}
    assert not [
        c
        for c in process.net_connections("tcp")
        if c.raddr and c.raddr.port in ports and c.status == "ESTABLISHED"
    ]
