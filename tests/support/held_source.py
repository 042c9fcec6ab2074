"""A source of groups that finishes what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from gym_sdk.schema import Group, Rollout, Task, Timing

__all__ = ["HeldSource", "settle"]


async def settle() -> None:
    """Let every task of the event loop do what it can."""
    for _ in range(20):
        await asyncio.sleep(0)


class HeldSource:
    """Begins every task as soon as it gets it, and hands its group out when the test says so.

    Attributes:
        begun: id and epoch of each task, in the order in which they began.
        opened: how many streams were opened, and `closed`, how many of them were left.
        may_drop: what its streams say, as `RolloutStream.may_drop`.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[str | None, int]] = []
        self.opened = self.closed = 0
        self.may_drop = False
        self._ready: asyncio.Queue[Group | BaseException | None] = asyncio.Queue()

    def finish(self, *tasks: Task) -> None:
        """Hand out the groups of tasks."""
        for task in tasks:
            rollout = Rollout(
                id=f"{task.id}/0", task=task, index=0, reward=0.5, timing=Timing(started_at=0.0)
            )
            self._ready.put_nowait(Group(task=task, rollouts=[rollout]))

    def end(self, error: BaseException | None = None) -> None:
        """End the stream."""
        self._ready.put_nowait(error)

    @asynccontextmanager
    async def __call__(self, tasks: AsyncIterable[Task], /) -> AsyncIterator[_Stream]:
        self.opened += 1
        reader = asyncio.create_task(self._begin(tasks))
        try:
            yield _Stream(self._ready, self.may_drop)
        finally:
            reader.cancel()
            await asyncio.wait([reader])
            self.closed += 1

    async def _begin(self, tasks: AsyncIterable[Task]) -> None:
        async for task in tasks:
            self.begun.append((task.id, task.epoch))


class _Stream:
    def __init__(self, ready: asyncio.Queue[Group | BaseException | None], may_drop: bool) -> None:
        self._ready = ready
        self.may_drop = may_drop

    def __aiter__(self) -> AsyncIterator[Group]:
        return self

    async def __anext__(self) -> Group:
        entry = await self._ready.get()
        if entry is None:
            raise StopAsyncIteration
        if isinstance(entry, BaseException):
            raise entry
        return entry
