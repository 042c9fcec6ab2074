"""Batches of rollouts that are made while the trainer learns from earlier ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TypeAlias

from gym_sdk.errors import ConfigurationError, GymError
from gym_sdk.grpo.sources import RolloutSource, in_order
from gym_sdk.grpo.tasks import TaskOrder
from gym_sdk.schema import Group, Task

__all__ = ["BatchFeed", "Replay"]

_log = logging.getLogger(__name__)

Replay: TypeAlias = Mapping[int, Sequence[Group]]
"""Finished groups that were not trained on yet, by the position of their batch."""


class BatchFeed:
    """Rolls out batches of tasks ahead of the training, in one stream that never ends.

    While the batch at position n is asked for, batches up to n + `ahead` may begin: so no rollout is trained
    on by weights that have seen more than `ahead` batches since it began. (AReaL bounds the age of its data
    by such a count, too: arXiv 2505.24298, equation 3.) Batches are handed out whole and in order: what a
    step trains on does not depend on how long a rollout took.

    Args:
        rollouts: where groups come from; it is given an asynchronous source of tasks, and has to deliver a
            group for each.
        order: the batches of tasks.
        ahead: how many batches beyond the one that is asked for may be begun.
    """

    def __init__(self, rollouts: RolloutSource, order: TaskOrder, *, ahead: int) -> None:
        self._rollouts = rollouts
        self._order = order
        self._ahead = ahead
        self._finished: dict[int, dict[str | None, Group]] = {}
        self._asked = -1
        self._may_begin = asyncio.Event()
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @property
    def finished(self) -> dict[int, list[Group]]:
        """The groups that are done and were not dropped, by the position of their batch."""
        return {position: list(groups.values()) for position, groups in self._finished.items() if groups}

    async def take(self, position: int) -> list[Group]:
        """Wait for a batch, and let those behind it begin; return its groups in the order of its tasks.

        The batch stays until `drop`, so that a step that was cancelled finds it again.

        Raises:
            Exception: whatever ended the stream of rollouts; the next call opens a new one.
            GymError: the source ended although its tasks never do, or was cancelled.
        """
        tasks = self._order.batch(position)
        self._asked = max(self._asked, position)
        self._may_begin.set()
        if self._reader is None:  # also if this batch is whole: those behind it are not
            self._reader = asyncio.create_task(self._read(position), name="gym-sdk rollouts ahead")
            self._reader.add_done_callback(lambda _: self._changed.set())
        while not self._is_whole(position, tasks):
            if self._reader.done():  # be it since the last batch was taken
                reader, self._reader = self._reader, None
                if reader.cancelled():
                    raise GymError("the rollout source was cancelled, but not by the trainer")
                reader.result()
                raise GymError(f"the rollout source ended before all groups of batch {position} were done")
            self._changed.clear()
            await self._changed.wait()
        return in_order(list(self._finished[position].values()), tasks)

    def drop(self, position: int) -> None:
        """Forget a batch that was trained on, and all before it."""
        for old in [known for known in self._finished if known <= position]:
            del self._finished[old]

    def restore(self, replay: Replay) -> None:
        """Replace what is finished by the groups that an earlier run had; they are not rolled out again."""
        self._asked = -1
        self._finished.clear()
        for position, groups in replay.items():
            ids = {task.id for task in self._order.batch(position)}
            self._finished[position] = {group.task.id: group for group in groups if group.task.id in ids}

    async def aclose(self) -> None:
        """End all rollouts that are under way; what had finished stays."""
        reader, self._reader = self._reader, None
        if reader is None:
            return
        reader.cancel()
        await asyncio.wait([reader])
        if not reader.cancelled() and (error := reader.exception()) is not None:
            _log.warning("the stream of rollouts had failed when it was closed: %r", error)

    def _is_whole(self, position: int, tasks: Sequence[Task]) -> bool:
        finished = self._finished.get(position, {})
        return all(task.id in finished for task in tasks)

    async def _read(self, first: int) -> None:
        """Roll out from a position on, until cancelled."""
        places: dict[tuple[str | None, int], int] = {}
        async with self._rollouts(self._tasks(first, places)) as stream:
            if getattr(stream, "may_drop", False):
                raise ConfigurationError(
                    "with max_staleness, a step waits for the groups of all its tasks, but the rollouts have "
                    "DynamicSampling(flat='drop'); let them be delivered: the trainer leaves flat groups out "
                    "by itself (GRPOConfig.drop_zero_variance)"
                )
            async for group in stream:
                position = places.pop((group.task.id, group.task.epoch), None)
                if position is not None:
                    self._finished[position][group.task.id] = group
                    self._changed.set()

    async def _tasks(self, first: int, places: dict[tuple[str | None, int], int]) -> AsyncGenerator[Task]:
        """Yield the tasks of each batch as soon as it may begin, noting where they belong."""
        position = first
        while True:
            while position > self._asked + self._ahead:
                self._may_begin.clear()
                await self._may_begin.wait()
            finished = self._finished.setdefault(position, {})
            for task in self._order.batch(position):
                if task.id not in finished:
                    places[task.id, task.epoch] = position
                    yield task
            position += 1
