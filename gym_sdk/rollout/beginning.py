"""How an attempt begins: anew, or where a cancelled one ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import uuid4

from pydantic import ValidationError

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item, Outcome, Rollout, Task, Timing

__all__ = ["Times", "empty_rollout", "going_on", "input_items", "unanswered_calls"]


@dataclass(slots=True)
class Times:
    """What a rollout spends its time on. Adding to a pydantic model costs ten times as much."""

    duration_s: float = 0.0
    model_s: float = 0.0
    tool_s: float = 0.0
    verifier_s: float = 0.0
    wait_s: float = 0.0

    @classmethod
    def of(cls, timing: Timing) -> Times:
        """Go on from these."""
        return cls(timing.duration_s, timing.model_s, timing.tool_s, timing.verifier_s, timing.wait_s)

    def timing(self, started_at: float) -> Timing:
        """Return them as data."""
        return Timing(
            started_at=started_at,
            duration_s=self.duration_s,
            model_s=self.model_s,
            tool_s=self.tool_s,
            verifier_s=self.verifier_s,
            wait_s=self.wait_s,
        )


def empty_rollout(task: Task, index: int, epoch: int) -> Rollout:
    """Return a rollout that holds what its task says.

    Raises:
        ConfigurationError: the task's input is not made of items.
    """
    items = input_items(task)
    return Rollout(
        id=f"ro_{uuid4().hex}",
        task=task,
        index=index,
        epoch=epoch,
        items=items,
        input_items=len(items),
        metrics={"turns": 0.0, "tool_calls": 0.0, "tool_errors": 0.0},
        timing=Timing(started_at=time.time()),
    )


def going_on(begun: Rollout, has_state: bool) -> Rollout:
    """Return a copy of a cancelled attempt, as it was before it ended.

    Raises:
        ConfigurationError: it is not a cancelled one, or the environment's state went with it.
    """
    if begun.outcome is not Outcome.CANCELLED:
        raise ConfigurationError(f"rollout {begun.id} is {begun.outcome}; only a cancelled one can go on")
    if has_state:
        raise ConfigurationError(
            f"rollout {begun.id} cannot go on: its environment's state (setup) ended with it; "
            "attempt the task anew"
        )
    return begun.model_copy(
        update={
            "items": list(begun.items),
            "model_calls": list(begun.model_calls),
            "metrics": dict(begun.metrics),
            "outcome": Outcome.COMPLETED,
            "cancellation": None,
        }
    )


def unanswered_calls(rollout: Rollout) -> list[FunctionCall]:
    """Return the function calls of the last turn that have no output: an attempt may have ended there."""
    if not rollout.model_calls:
        return []
    answered = {item.call_id for item in rollout.items if isinstance(item, FunctionCallOutput)}
    return [call for call in rollout.function_calls if call.call_id not in answered]


def input_items(task: Task) -> list[Item]:
    """Return the task's input as items.

    Raises:
        ConfigurationError: an entry is not an item.
    """
    try:
        return task.items()
    except ValidationError as error:
        raise ConfigurationError(
            f"task {task.id}: its input holds something that is no item: {error}"
        ) from error
