"""What a tool may know about the rollout that calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gym_sdk.schema import Task

__all__ = ["ToolContext"]


@dataclass(frozen=True, slots=True)
class ToolContext:
    """The rollout that calls a tool.

    A tool whose first parameter is annotated with this class receives it; the model never sees that
    parameter.

    Attributes:
        task: the task of the rollout.
        rollout_id: the rollout's id.
        state: what the environment's `setup` returned for this rollout.
    """

    task: Task | None = None
    rollout_id: str = ""
    state: Any = None
