"""A task: one problem, and what a verifier needs to score an attempt at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gym_sdk.schema.items import Item, as_items

__all__ = ["Task"]


@dataclass(frozen=True, slots=True)
class Task:
    """One problem.

    Attributes:
        input: the prompt: text, or items (objects or dicts in the API's shape).
        answer: what a verifier compares with; any JSON value.
        id: names the task's group. Streams number the tasks that have none by their position.
        instructions: system text of this task.
        settings: request fields of this task, e.g. `{"temperature": 0.7}`; they win over the call's.
        metadata: anything else, for verifiers and tables; `tags` there split the metrics.
        epoch: how often its group was rolled out before, in a run that repeats its tasks and says so itself
            (a trainer's). Id and epoch together name the group: in seeds, in stores, and in a stream.
    """

    input: str | Sequence[Item | Mapping[str, Any]]
    answer: Any = None
    id: str | None = None
    instructions: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0

    def items(self) -> list[Item]:
        """The input as items.

        Raises:
            pydantic.ValidationError: an entry of `input` is not an item.
        """
        return as_items(self.input)
