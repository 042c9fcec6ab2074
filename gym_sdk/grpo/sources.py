"""Where groups of rollouts come from."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from gym_sdk.schema import Group, Task

__all__ = ["RolloutSource", "collect"]


class RolloutSource(Protocol):
    """Starts the rollouts of some tasks: `partial(client.rollouts, tools=..., verifier=..., group_size=8)`.

    Entering the context starts them, iterating yields the groups in the order they finish, leaving it ends
    whatever still runs. Any other source of groups that does the same serves as well.
    """

    def __call__(self, tasks: Sequence[Task], /) -> AbstractAsyncContextManager[AsyncIterable[Group]]:
        """Return the stream of the tasks' groups."""
        ...


async def collect(rollouts: RolloutSource, tasks: Sequence[Task]) -> list[Group]:
    """Wait for the groups of all tasks; return them in the order of the tasks."""
    async with rollouts(tasks) as stream:
        groups = [group async for group in stream]
    order = {task.id: position for position, task in enumerate(tasks)}
    return sorted(groups, key=lambda group: order.get(group.task.id, len(order)))
