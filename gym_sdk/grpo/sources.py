"""Where groups of rollouts come from."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

from gym_sdk.schema import Group, Task

__all__ = ["RolloutSource", "Tasks", "collect"]

Tasks: TypeAlias = Sequence[Task] | AsyncIterable[Task]


class RolloutSource(Protocol):
    """Starts the rollouts of some tasks: `partial(client.rollouts, tools=..., verifier=..., group_size=8)`.

    Entering the context starts them, iterating yields the groups in the order they finish, leaving it ends
    whatever still runs. Any other source of groups that does the same serves as well.
    """

    def __call__(self, tasks: Tasks, /) -> AbstractAsyncContextManager[AsyncIterable[Group]]:
        """Return the stream of the tasks' groups.

        Args:
            tasks: a list; or, for training that runs beside the rollouts (`GRPOConfig.max_staleness`), a
                source that never ends and makes its reader wait until the next tasks may begin.
        """
        ...


async def collect(rollouts: RolloutSource, tasks: Sequence[Task]) -> list[Group]:
    """Wait for the groups of all tasks; return them in the order of the tasks."""
    async with rollouts(tasks) as stream:
        groups = [group async for group in stream]
    return in_order(groups, tasks)


def in_order(groups: Sequence[Group], tasks: Sequence[Task]) -> list[Group]:
    """Sort groups by their tasks' places; those of other tasks come last."""
    order = {task.id: position for position, task in enumerate(tasks)}
    return sorted(groups, key=lambda group: order.get(group.task.id, len(order)))
