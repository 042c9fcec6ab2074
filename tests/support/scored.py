"""Finished rollouts and groups made by hand, for what counts them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from gym_sdk.schema import Group, Message, ModelCall, Outcome, OutputText, Rollout, Task, Timing
from gym_sdk.tokens import CallTokens

_numbers = itertools.count()


def scored(
    reward: float | None, text: str = "", *, task: Task | None = None, index: int = 0, **fields: Any
) -> Rollout:
    """Return a rollout of one model call (2 prompt tokens, 3 generated) that says `text`."""
    message = Message(role="assistant", id=f"msg_{next(_numbers)}", content=[OutputText(text=text)])
    call = ModelCall(
        response_id="resp", first_item=0, end_item=1, tokens=CallTokens([1, 2], [3, 4, 5], [-0.5, -0.5, -0.5])
    )
    values: dict[str, Any] = {
        "items": [message],
        "model_calls": [call],
        "outcome": Outcome.COMPLETED,
        "timing": Timing(started_at=0.0),
    }
    return Rollout(
        id=f"ro_{next(_numbers)}",
        task=task or Task("question", id="task"),
        index=index,
        reward=reward,
        **(values | fields),
    )


def group_of(
    rewards: Sequence[float | None], *, task: Task | None = None, texts: Sequence[str] = ()
) -> Group:
    """Return a group; a rollout without reward was cancelled."""
    task = task or Task("question", id=f"task-{next(_numbers)}")
    said = [*texts, *([""] * (len(rewards) - len(texts)))]
    rollouts = [
        scored(
            reward,
            text,
            task=task,
            index=index,
            outcome=Outcome.CANCELLED if reward is None else Outcome.COMPLETED,
        )
        for index, (reward, text) in enumerate(zip(rewards, said, strict=True))
    ]
    return Group(task=task, rollouts=rollouts)
