"""The order in which tasks are trained on: a pure function of the seed and the position."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Task

__all__ = ["TaskOrder"]


class TaskOrder:
    """Batches of tasks by position: each epoch is shuffled anew, and its incomplete last batch left out.

    Args:
        tasks: at least one, with unique ids; a task without id gets its position as id.
        per_batch: tasks in a batch; all of them if there are fewer.
        seed: of the shuffles.

    Raises:
        ConfigurationError: there are no tasks, or an id occurs twice.
    """

    def __init__(self, tasks: Sequence[Task], *, per_batch: int, seed: int) -> None:
        if not tasks:
            raise ConfigurationError("training needs at least one task")
        self._tasks = [
            task if task.id is not None else dataclasses.replace(task, id=str(index))
            for index, task in enumerate(tasks)
        ]
        seen: set[str | None] = set()
        for task in self._tasks:
            if task.id in seen:
                raise ConfigurationError(
                    f"two tasks have the id {task.id!r}; an id names a task's group, so it must be unique"
                )
            seen.add(task.id)
        self._per_batch = min(per_batch, len(self._tasks))
        self._per_epoch = len(self._tasks) // self._per_batch
        self._seed = seed

    @property
    def fingerprint(self) -> str:
        """Names the sequence of batches: ids in order, batch size and seed."""
        digest = hashlib.sha256(f"{self._seed}:{self._per_batch}".encode())
        for task in self._tasks:
            digest.update(f"\0{task.id}".encode())
        return digest.hexdigest()

    def batch(self, position: int) -> list[Task]:
        """Return the batch at a position, counted from 0 over all epochs; its tasks say which epoch it is."""
        epoch, within = divmod(position, self._per_epoch)
        order = list(range(len(self._tasks)))
        random.Random(f"{self._seed}:{epoch}").shuffle(order)
        first = within * self._per_batch
        chosen = (self._tasks[index] for index in order[first : first + self._per_batch])
        return [dataclasses.replace(task, epoch=epoch) for task in chosen]
