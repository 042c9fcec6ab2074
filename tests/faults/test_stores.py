"""Disks that are full, or refuse for a moment; task sources that raise: what was collected stays."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.collecting import (
    check,
    check_samples,
    collected,
    leaving_nothing,
    lines_by_key,
    look,
    questions,
    right,
)
from support.faulty_policy import serving

from gym_sdk import GymClient, Limits, Rollout, Task
from gym_sdk.errors import DatasetError, StoreError
from gym_sdk.store import read_rollouts

pytestmark = pytest.mark.asyncio


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have the system refuse to let a file grow beyond this, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


async def until_it_fails(client: GymClient, store: Path, count: int) -> list[Rollout]:
    """Take groups until the store refuses one; check what the user is told."""
    rollouts: list[Rollout] = []
    stream = client.rollouts(
        questions(count),
        group_size=2,
        tools=[look],
        verifier=right,
        store=store,
        limits=Limits(concurrency=8),
    )
    with pytest.raises(StoreError) as caught:
        async with stream:
            async for group in stream:
                rollouts += group.rollouts
    said = str(caught.value)
    assert said.startswith(f"{store}: cannot be written: ")
    assert "are safe" in said
    assert "the same call with the same store then goes on from there" in said
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC, errno.EIO)
    return rollouts


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
async def test_a_full_disk(suffix: str, tmp_path: Path) -> None:
    store = tmp_path / f"r.{suffix}"
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        with files_of_at_most(20_000):
            before = await until_it_fails(client, store, 60)
        stored = {rollout.key: rollout for rollout in read_rollouts(store)}
        assert len(stored) > 8
        # what was delivered had been stored before
        assert {rollout.key: rollout.id for rollout in before}.items() <= {
            k: r.id for k, r in stored.items()
        }.items()
        sampled = policy.samples
        collection = await collected(client, store, count=60)
    assert {rollout.id for rollout in collection.rollouts} >= {rollout.id for rollout in stored.values()}
    assert policy.samples - sampled == 2 * (120 - len(stored))
    assert len(list(read_rollouts(store, every=True))) == 120


async def test_a_disk_that_was_full_before(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    store.symlink_to("/dev/full")
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        assert await until_it_fails(client, store, 4) == []


class FlakyDisk:
    """Stands in for `os.write`: an error at the n-th line, after some of its bytes."""

    def __init__(self, at: int) -> None:
        self.write = os.write
        self.lines = 0
        self.at = at

    def __call__(self, descriptor: int, data: Any) -> int:
        if len(data) < 100:  # a wake-up of the event loop, and the like
            return self.write(descriptor, data)
        self.lines += 1
        if self.lines == self.at:
            self.write(descriptor, bytes(data[:50]))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.write(descriptor, data)


async def test_a_disk_that_refuses_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends at once rather than to go on without a record; the next one goes on where it ended."""
    store = tmp_path / "r.jsonl"
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FlakyDisk(at=15))
            before = await until_it_fails(client, store, 30)
        stored = list(read_rollouts(store, every=True))
        assert len(stored) >= 14
        assert {rollout.id for rollout in before} <= {rollout.id for rollout in stored}
        await collected(client, store, count=30)
    assert {len(lines) for lines in lines_by_key(store).values()} == {1}


def broken_source(good: int) -> Iterator[Task]:
    yield from questions(good)
    raise DatasetError("not JSON", path="tasks.jsonl", line=good + 1)


async def broken_async_source(good: int) -> AsyncIterator[Task]:
    for task in questions(good):
        await asyncio.sleep(0)
        yield task
    raise RuntimeError("the queue of tasks is gone")


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (broken_source, DatasetError, r"tasks\.jsonl:11"),
        (broken_async_source, RuntimeError, "queue of tasks"),
    ],
)
async def test_a_task_source_that_raises(
    source: Any, error: type[Exception], said: str, tmp_path: Path
) -> None:
    """What was admitted before is delivered, then the error comes; a second run repeats nothing."""
    store, rollouts = tmp_path / "r.jsonl", list[Rollout]()
    async with serving(latency_s=0.005) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        with pytest.raises(error, match=said):
            async with client.rollouts(
                source(10), group_size=2, tools=[look], verifier=right, store=store
            ) as stream:
                async for group in stream:
                    rollouts += group.rollouts
        check(rollouts, store, count=10, group_size=2)
        assert policy.samples == 40
        collection = await collected(client, store, count=12)
    assert policy.samples == 48
    check_samples(collection.rollouts)


async def test_a_task_source_that_hangs(tmp_path: Path) -> None:
    """What it gave is delivered; leaving the stream ends it."""
    closed = asyncio.Event()

    async def source() -> AsyncIterator[Task]:
        try:
            for task in questions(3):
                yield task
            await asyncio.Event().wait()
        finally:
            closed.set()

    store, rollouts = tmp_path / "r.jsonl", list[Rollout]()
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        async with client.rollouts(
            source(), group_size=2, tools=[look], verifier=right, store=store
        ) as stream:
            while len(rollouts) < 6:
                rollouts += (await anext(stream)).rollouts
        assert closed.is_set()
    check(rollouts, store, count=3, group_size=2)


async def test_two_runs_with_one_store(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    async with serving(latency_s=0.02) as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        async with client.rollouts(
            questions(6), group_size=2, tools=[look], verifier=right, store=store
        ) as stream:
            with pytest.raises(StoreError, match="has this store open; a store has one writer at a time"):
                await client.collect(questions(6), store=store)
            rollouts = [rollout async for group in stream for rollout in group.rollouts]
    check(rollouts, store, count=6, group_size=2)
