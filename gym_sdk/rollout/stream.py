"""Many rollouts: admitted lazily from the tasks, delivered as groups, the first finished first."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sized
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from gym_sdk.errors import ConfigurationError
from gym_sdk.rollout.journal import Journal
from gym_sdk.rollout.progress import Progress
from gym_sdk.rollout.run import input_items
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import Group, Rollout, Task

__all__ = ["RolloutStream", "StreamOptions", "TaskSource", "as_task"]

_log = logging.getLogger(__name__)

TaskSource: TypeAlias = Iterable[Task | str] | AsyncIterable[Task | str]
Attempt: TypeAlias = Callable[[Task, int], Awaitable[Rollout]]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a stream admits and keeps rollouts."""

    group_size: int = 1
    """Rollouts of each task."""
    concurrency: int = 256
    """Rollouts in flight; a finished group that nobody has taken yet still holds one place."""
    store: Path | None = None
    """JSONL file to which each rollout is appended when it finishes."""
    progress: bool = False
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigurationError(f"group_size must be at least 1, not {self.group_size}")


def as_task(entry: Task | str) -> Task:
    """Return the task; text becomes one.

    Raises:
        ConfigurationError: the entry is neither.
    """
    if isinstance(entry, str):
        return Task(entry)
    if not isinstance(entry, Task):
        raise ConfigurationError(f"a task must be a Task or text, not {type(entry).__name__}")
    return entry


class RolloutStream:
    """An asynchronous context manager and iterator over groups.

    Leaving the context cancels every rollout in flight and aborts its generation on the server. A stream
    belongs to the task that entered it. If the task source fails, what was admitted before is delivered
    first, then the source's error is raised.

    Args:
        tasks: the source; it is read only as fast as groups are taken.
        attempt: runs one rollout of a task.
        options: group size, concurrency, store, progress.
    """

    def __init__(self, tasks: TaskSource, attempt: Attempt, options: StreamOptions) -> None:
        if isinstance(tasks, str | Task):
            raise ConfigurationError("tasks must be a list or another source of tasks; use [task] for one")
        self._tasks = tasks
        self._attempt = attempt
        self._options = options
        self._slots = anyio.Semaphore(options.concurrency)
        self._stack = AsyncExitStack()
        self._task_group: TaskGroup | None = None
        self._source_error: Exception | None = None
        self._exhausted = False
        self._open_groups = 0
        self._started = 0
        self._positions: dict[str, int] = {}
        self._send: MemoryObjectSendStream[Group]
        self._receive: MemoryObjectReceiveStream[Group]
        self._journal: Journal | None = None
        self._progress: Progress | None = None
        self.watch = TokenWatch()
        """Counts over the rollouts that finished so far: forks, unparsed calls, ..."""

    async def __aenter__(self) -> Self:
        if self._task_group is not None:
            raise ConfigurationError("a rollout stream can be entered only once")
        options = self._options
        if options.store is not None:
            self._journal = self._stack.enter_context(Journal(options.store))
        if options.progress:
            total = len(self._tasks) * options.group_size if isinstance(self._tasks, Sized) else None
            self._progress = self._stack.enter_context(Progress(total))
        self._send, self._receive = anyio.create_memory_object_stream[Group](0)
        self._stack.callback(self._receive.close)
        self._stack.callback(self._send.close)
        self._task_group = anyio.create_task_group()
        await self._task_group.__aenter__()
        self._task_group.start_soon(self._admit)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._task_group is not None
        self._task_group.cancel_scope.cancel()
        try:
            if isinstance(error, anyio.get_cancelled_exc_class()):
                return await self._task_group.__aexit__(kind, error, traceback)
            # The caller's own exception passes as it is, not wrapped into a group.
            await self._task_group.__aexit__(None, None, None)
        except BaseExceptionGroup as failures:
            if len(failures.exceptions) == 1:
                raise failures.exceptions[0] from None
            raise
        finally:
            await self._stack.aclose()
        return None

    def position(self, task_id: str) -> int:
        """Return where in the source the task with this id stood, from 0."""
        return self._positions[task_id]

    def __aiter__(self) -> AsyncIterator[Group]:
        return self

    async def __anext__(self) -> Group:
        if self._task_group is None:
            raise ConfigurationError("enter the stream first: async with client.rollouts(...) as stream")
        try:
            return await self._receive.receive()
        except anyio.EndOfStream:
            if self._source_error is not None:
                error, self._source_error = self._source_error, None
                raise error from None
            raise StopAsyncIteration from None

    async def _admit(self) -> None:
        """Start rollouts while there is room; end when the source does."""
        assert self._task_group is not None
        try:
            async with aclosing(_iterate(self._tasks)) as tasks:
                async for entry in tasks:
                    await self._start_group(_named(as_task(entry), self._positions), self._task_group)
        except Exception as error:
            _log.warning("the task source failed after %d tasks: %s", len(self._positions), error)
            self._source_error = error
        self._exhausted = True
        self._close_if_done()

    async def _start_group(self, task: Task, task_group: TaskGroup) -> None:
        input_items(task)  # what is no task at all ends the source, not a rollout
        group = _OpenGroup(task, [None] * self._options.group_size)
        self._open_groups += 1
        for index in range(self._options.group_size):
            await self._slots.acquire()
            task_group.start_soon(self._run, group, index, self._started)
            self._started += 1

    async def _run(self, group: _OpenGroup, index: int, order: int) -> None:
        try:
            rollout = await self._attempt(group.task, index)
            if self._journal is not None:
                self._journal.write(rollout)
            self.watch.add(rollout, order=order)
            if self._progress is not None:
                self._progress.add(rollout)
            group.rollouts[index] = rollout
            finished = [entry for entry in group.rollouts if entry is not None]
            if len(finished) == len(group.rollouts):
                # Waits until somebody takes the group; its place stays taken meanwhile.
                await self._send.send(Group(task=group.task, rollouts=finished))
                self._open_groups -= 1
                self._close_if_done()
        finally:
            self._slots.release()

    def _close_if_done(self) -> None:
        if self._exhausted and not self._open_groups:
            self._send.close()


@dataclass(slots=True)
class _OpenGroup:
    """A group some of whose rollouts are still running."""

    task: Task
    rollouts: list[Rollout | None]


def _named(task: Task, positions: dict[str, int]) -> Task:
    """Give the task an id if it has none, note its position, and refuse an id that was used before."""
    if task.id is None:
        task = replace(task, id=f"task-{len(positions):06d}")
    assert task.id is not None
    if task.id in positions:
        raise ConfigurationError(
            f"two tasks of one stream have the id {task.id!r}; ids name groups and must differ "
            "(dataclasses.replace(task, id=...))"
        )
    positions[task.id] = len(positions)
    return task


async def _iterate(tasks: TaskSource) -> AsyncGenerator[Task | str]:
    if isinstance(tasks, AsyncIterable):
        async for entry in tasks:
            yield entry
    else:
        for entry in tasks:
            yield entry
