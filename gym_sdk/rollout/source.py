"""Where tasks come from, and in which order they are admitted."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Task

__all__ = ["Schedule", "TaskOrder", "TaskSource", "as_task", "read_tasks"]

TaskSource: TypeAlias = Iterable[Task | str] | AsyncIterable[Task | str]

TaskOrder: TypeAlias = Literal["arrival", "priority", "cost"] | Callable[[Task], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When tasks are admitted.

    Raises:
        ConfigurationError: a value is out of range.
    """

    order: TaskOrder = "arrival"
    """`arrival`: as the source gives them. `priority`: the largest `metadata["priority"]` first (0 without
    one). `cost`: the largest `metadata["cost"]` first, or without one the longest input, so that what takes
    long does not begin last. A function: the largest result first."""
    lookahead: int = 1024
    """How many tasks are read ahead to choose from, unless the order is `arrival`."""
    epochs: int | None = 1
    """How often the source is gone through; None: for ever. More than once needs a source that can be read
    again, such as a list."""
    ramp_s: float = 0.0
    """The concurrency grows from one rollout to its limit over this many seconds."""
    ahead: int | None = None
    """Most groups that are admitted and not taken yet, so that none waits for long; by default, only
    `Limits.concurrency` bounds them."""

    def __post_init__(self) -> None:
        if not callable(self.order) and self.order not in ("arrival", "priority", "cost"):
            raise ConfigurationError(
                f"Schedule.order must be 'arrival', 'priority', 'cost' or a function, not {self.order!r}"
            )
        for name in ("lookahead", "epochs", "ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"Schedule.{name} must be at least 1, not {value}")
        if self.ramp_s < 0:
            raise ConfigurationError(f"Schedule.ramp_s must not be negative, not {self.ramp_s}")


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


def check_source(tasks: TaskSource, schedule: Schedule) -> None:
    """Refuse what cannot be a source, or cannot be read as often as the schedule asks.

    Raises:
        ConfigurationError: it cannot.
    """
    if isinstance(tasks, str | Task):
        raise ConfigurationError("tasks must be a list or another source of tasks; use [task] for one")
    if not isinstance(tasks, Iterable | AsyncIterable):
        raise ConfigurationError(f"tasks must be a list or another source, not {type(tasks).__name__}")
    once = (tasks.__aiter__() if isinstance(tasks, AsyncIterable) else iter(tasks)) is tasks
    if once and schedule.epochs != 1:
        raise ConfigurationError(
            "tasks can be read only once, but Schedule.epochs asks for more; give a list, or an iterator "
            "that repeats them under other ids"
        )


async def read_tasks(
    tasks: TaskSource, schedule: Schedule, positions: dict[tuple[str, int], int]
) -> AsyncGenerator[tuple[Task, int]]:
    """Yield each task with its epoch, in the order of admission; tasks without id are named by position.

    Args:
        tasks: the source; it is read only as far as needed.
        schedule: order, look-ahead and epochs.
        positions: gets the position in the source of each task, by its id and own epoch.

    Raises:
        ConfigurationError: an entry is no task, or an id occurs twice.
    """
    epochs = itertools.count() if schedule.epochs is None else range(schedule.epochs)
    for epoch in epochs:
        count = 0
        async with aclosing(_ordered(_iterate(tasks), schedule)) as ordered:
            async for position, task in ordered:
                count += 1
                if task.id is None:
                    task = replace(task, id=f"task-{position:06d}")
                _note_position(task, position, positions, again=epoch > 0)
                yield task, epoch + task.epoch
        if count == 0:
            return  # repeating nothing would never end


def _note_position(task: Task, position: int, positions: dict[tuple[str, int], int], *, again: bool) -> None:
    assert task.id is not None
    known = positions.setdefault((task.id, task.epoch), position)
    if known == position:
        return
    if again:
        raise ConfigurationError(
            f"in a later epoch, the task {task.id!r} has another position; a source that is repeated must "
            "give the same tasks each time"
        )
    raise ConfigurationError(
        f"two tasks of one stream have the id {task.id!r}; ids name groups and must differ "
        "(dataclasses.replace(task, id=...))"
    )


async def _iterate(tasks: TaskSource) -> AsyncGenerator[tuple[int, Task]]:
    """Number the entries of a source. A generator is closed with this, wherever it stands."""
    position = 0
    if isinstance(tasks, AsyncIterable):
        iterator = aiter(tasks)
        try:
            async for entry in iterator:
                yield position, as_task(entry)
                position += 1
        finally:
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()
        return
    entries = iter(tasks)
    try:
        for entry in entries:
            yield position, as_task(entry)
            position += 1
    finally:
        if isinstance(entries, Generator):
            entries.close()


async def _ordered(
    tasks: AsyncGenerator[tuple[int, Task]], schedule: Schedule
) -> AsyncGenerator[tuple[int, Task]]:
    """Yield the best of the next tasks first; among equals, the first to arrive."""
    async with aclosing(tasks):
        if schedule.order == "arrival":
            async for pair in tasks:
                yield pair
            return
        key = _KEYS[schedule.order] if isinstance(schedule.order, str) else schedule.order
        window: list[tuple[float, int, Task]] = []
        async for position, task in tasks:
            heapq.heappush(window, (-float(key(task)), position, task))
            if len(window) >= schedule.lookahead:
                _, position, task = heapq.heappop(window)
                yield position, task
        while window:
            _, position, task = heapq.heappop(window)
            yield position, task


def _priority(task: Task) -> float:
    return float(task.metadata.get("priority", 0.0))


def _cost(task: Task) -> float:
    cost = task.metadata.get("cost")
    if cost is not None:
        return float(cost)
    return float(
        len(task.input) if isinstance(task.input, str) else sum(len(str(item)) for item in task.input)
    )


_KEYS: dict[str, Callable[[Task], float]] = {"priority": _priority, "cost": _cost}
