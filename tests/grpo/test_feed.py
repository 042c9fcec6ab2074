"""Batches made ahead: what may begin when, what is handed out, and what is left when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.held_source import HeldSource, settle

from gym_sdk.errors import ConfigurationError, GymError, TransportError
from gym_sdk.grpo.feed import BatchFeed
from gym_sdk.grpo.tasks import TaskOrder
from gym_sdk.schema import Group, Rollout, Task, Timing

TASKS = [Task(f"task {number}", id=f"t{number}") for number in range(6)]
ORDER = TaskOrder(TASKS, per_batch=2, seed=0)  # three batches in an epoch


def names(position: int, order: TaskOrder = ORDER) -> list[tuple[str | None, int]]:
    return [(task.id, task.epoch) for task in order.batch(position)]


def up_to(position: int) -> list[tuple[str | None, int]]:
    return [name for before in range(position + 1) for name in names(before)]


def of(groups: list[Group]) -> list[tuple[str | None, int]]:
    return [(group.task.id, group.task.epoch) for group in groups]


async def taken(feed: BatchFeed, position: int) -> list[Group]:
    async with asyncio.timeout(10):
        return await feed.take(position)


@asynccontextmanager
async def opened(*, ahead: int = 1, order: TaskOrder = ORDER) -> AsyncIterator[tuple[BatchFeed, HeldSource]]:
    """Yield a feed and its source; afterwards, nothing of either may be left."""
    source = HeldSource()
    feed = BatchFeed(source, order, ahead=ahead)
    before = asyncio.all_tasks()
    try:
        yield feed, source
    finally:
        await feed.aclose()
        assert asyncio.all_tasks() == before
        assert source.closed == source.opened


@pytest.mark.asyncio
@pytest.mark.parametrize("ahead", [1, 2, 4])
async def test_so_many_batches_ahead_begin_and_no_more(ahead: int) -> None:
    async with opened(ahead=ahead) as (feed, source):
        for position in range(8):
            taking = asyncio.create_task(feed.take(position))
            await settle()
            assert source.begun == up_to(position + ahead)
            source.finish(*ORDER.batch(position))
            assert of(await taking) == names(position)
            feed.drop(position)
            await settle()
            assert source.begun == up_to(position + ahead)  # also while the trainer learns
        assert source.opened == 1


@pytest.mark.asyncio
async def test_a_straggler_holds_up_its_batch_and_nothing_is_trained_in_its_place() -> None:
    async with opened(ahead=2) as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        slow, quick = ORDER.batch(0)
        source.finish(quick, *ORDER.batch(1), *ORDER.batch(2))
        await settle()
        assert not taking.done()
        source.finish(slow)
        assert of(await taking) == names(0)
        assert of(await taken(feed, 1)) == names(1)  # was whole already
        assert of(await taken(feed, 2)) == names(2)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_order_of_finishing_gives_the_same_batches_within_the_bound(data: st.DataObject) -> None:
    ahead = data.draw(st.integers(1, 3), label="ahead")
    order = TaskOrder(TASKS, per_batch=data.draw(st.integers(1, 6), label="per_batch"), seed=1)

    async def train() -> None:
        async with opened(ahead=ahead, order=order) as (feed, source):
            handed_out = 0
            for position in range(5):
                taking = asyncio.create_task(feed.take(position))
                await settle()
                while not taking.done():
                    flying = [name for name in source.begun if name not in finished]
                    task_id, epoch = data.draw(st.sampled_from(flying), label="finishes")
                    finished.add((task_id, epoch))
                    source.finish(Task("again", id=task_id, epoch=epoch))
                    await settle()
                assert of(taking.result()) == names(position, order)
                handed_out += len(taking.result())
                feed.drop(position)
                most = sum(len(names(number, order)) for number in range(position + ahead + 1))
                assert len(source.begun) == most
            assert source.begun[:handed_out] == [
                name for position in range(5) for name in names(position, order)
            ]

    finished: set[tuple[str | None, int]] = set()
    asyncio.run(train())


@pytest.mark.asyncio
async def test_epochs_in_flight_together_are_not_mixed_up() -> None:
    order = TaskOrder(TASKS[:2], per_batch=2, seed=0)
    async with opened(order=order) as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        source.finish(*order.batch(1))
        await settle()
        assert not taking.done()
        source.finish(*order.batch(0))
        assert {epoch for _, epoch in of(await taking)} == {0}
        assert of(await taken(feed, 1)) == names(1, order)
        assert {epoch for _, epoch in names(1, order)} == {1}


@pytest.mark.asyncio
async def test_groups_of_other_tasks_and_second_groups_are_ignored() -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        first, second = ORDER.batch(0)
        source.finish(Task("x", id="stranger"), first, first)
        await settle()
        assert not taking.done()
        source.finish(second)
        assert of(await taking) == names(0)
        feed.drop(0)
        source.finish(first)  # of a batch that is over
        await settle()
        assert feed.finished == {}


@pytest.mark.asyncio
async def test_a_batch_stays_until_it_is_dropped() -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        source.finish(*ORDER.batch(0), *ORDER.batch(1)[:1])
        groups = await taking
        assert await taken(feed, 0) == groups
        assert {position: len(found) for position, found in feed.finished.items()} == {0: 2, 1: 1}
        feed.drop(0)
        assert list(feed.finished) == [1]


@pytest.mark.asyncio
async def test_whoever_stops_waiting_leaves_the_rollouts_alone() -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        taking.cancel()
        await asyncio.wait([taking])
        assert taking.cancelled()
        assert source.closed == 0
        source.finish(*ORDER.batch(0))
        assert of(await taken(feed, 0)) == names(0)
        assert source.opened == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (TransportError("gone", retryable=True), "gone"),
        (None, "the rollout source ended before all groups of batch 0"),
        (asyncio.CancelledError(), "the rollout source was cancelled, but not by the trainer"),
    ],
)
async def test_a_source_that_ends_is_an_error_and_the_next_call_goes_on_with_another(
    error: BaseException | None, raised: str
) -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        done, missing = ORDER.batch(0)
        source.finish(done)
        source.end(error)
        with pytest.raises(GymError, match=raised):
            await taking
        assert source.closed == 1
        source.begun.clear()
        taking = asyncio.create_task(feed.take(0))
        await settle()
        assert source.begun == [(missing.id, 0), *names(1)]  # what had finished is not begun again
        source.finish(missing)
        assert of(await taking) == names(0)


@pytest.mark.asyncio
async def test_a_source_that_fails_between_two_batches_is_noticed_at_the_next() -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        source.finish(*ORDER.batch(0))
        source.end(TransportError("gone", retryable=True))
        await taking
        await settle()
        assert source.closed == 1
        feed.drop(0)
        with pytest.raises(TransportError, match="gone"):
            await taken(feed, 1)
        taking = asyncio.create_task(feed.take(1))
        await settle()
        source.finish(*ORDER.batch(1))
        assert of(await taking) == names(1)
        assert source.opened == 2


@pytest.mark.asyncio
async def test_a_batch_that_is_whole_is_handed_out_whatever_became_of_the_source() -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        source.finish(*ORDER.batch(0), *ORDER.batch(1))
        source.end(TransportError("gone", retryable=True))
        await taking
        await settle()
        assert of(await taken(feed, 1)) == names(1)
        with pytest.raises(TransportError, match="gone"):
            await taken(feed, 2)


def group_of(task: Task) -> Group:
    rollout = Rollout(id=f"old/{task.id}", task=task, index=0, reward=1.0, timing=Timing(started_at=0.0))
    return Group(task=task, rollouts=[rollout])


@pytest.mark.asyncio
async def test_what_an_earlier_run_had_finished_is_not_rolled_out_again() -> None:
    first, second = ORDER.batch(4)
    old, stranger = group_of(first), group_of(Task("x", id="stranger"))
    async with opened(ahead=2) as (feed, source):
        feed.restore({3: [group_of(task) for task in ORDER.batch(3)], 4: [old, stranger]})
        assert of(await taken(feed, 3)) == names(3)
        await settle()
        assert source.begun == [(second.id, second.epoch), *names(5)]  # while the trainer learns from batch 3
        feed.drop(3)
        taking = asyncio.create_task(feed.take(4))
        await settle()
        assert source.begun == [(second.id, second.epoch), *names(5), *names(6)]
        source.finish(second)
        groups = await taking
        assert of(groups) == names(4)
        assert groups[0] is old


@pytest.mark.asyncio
async def test_restoring_replaces_what_was_there_and_the_bound_with_it() -> None:
    async with opened(ahead=1) as (feed, source):
        taking = asyncio.create_task(feed.take(5))
        await settle()
        source.finish(*ORDER.batch(5))
        await taking
        await feed.aclose()
        feed.restore({})
        assert feed.finished == {}
        source.begun.clear()
        taking = asyncio.create_task(feed.take(1))
        await settle()
        assert source.begun == [*names(1), *names(2)]
        source.finish(*ORDER.batch(1))
        await taking


@pytest.mark.asyncio
async def test_closing_ends_the_rollouts_and_keeps_what_had_finished() -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        done, missing = ORDER.batch(0)
        source.finish(done)
        await settle()
        taking.cancel()
        await feed.aclose()
        assert source.closed == 1
        assert of(feed.finished[0]) == [(done.id, 0)]
        await feed.aclose()  # nothing is left to be done
        taking = asyncio.create_task(feed.take(0))
        await settle()
        source.finish(missing)
        assert of(await taking) == names(0)
        assert source.opened == 2


@pytest.mark.asyncio
async def test_a_failure_that_nobody_waits_for_any_more_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with opened() as (feed, source):
        taking = asyncio.create_task(feed.take(0))
        await settle()
        source.finish(*ORDER.batch(0))
        await taking
        source.end(TransportError("gone", retryable=True))
        await settle()
        with caplog.at_level(logging.WARNING, logger="gym_sdk.grpo.feed"):
            await feed.aclose()
    assert "the stream of rollouts had failed when it was closed" in caplog.text


@pytest.mark.asyncio
async def test_a_stream_that_may_drop_groups_is_refused() -> None:
    async with opened() as (feed, source):
        source.may_drop = True
        with pytest.raises(ConfigurationError, match=r"flat='drop'.*drop_zero_variance"):
            await taken(feed, 0)
