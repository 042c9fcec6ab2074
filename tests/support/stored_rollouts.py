"""Rollouts for stores, made quickly and without a policy."""

from __future__ import annotations

from typing import Any

from gym_sdk.schema import Failure, Message, ModelCall, Outcome, Rollout, RolloutKey, Task, Timing
from gym_sdk.schema.rollout import Stage
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = ["attempt", "failed", "key"]


def attempt(
    number: int = 0,
    *,
    index: int = 0,
    epoch: int = 0,
    reward: float | None = 1.0,
    said: str = "a",
    tokens: int = 3,
    **fields: Any,
) -> Rollout:
    """A rollout that was completed; `said` is its answer."""
    calls = [
        ModelCall(
            response_id=f"resp_{number}",
            first_item=1,
            end_item=2,
            tokens=CallTokens(
                list(range(tokens)), [7] * tokens, [-0.5] * tokens, (WeightSpan("3", 0, tokens),)
            ),
        )
    ]
    if not tokens:
        calls[0].tokens = None
    task = fields.pop("task", None) or Task(
        f"question {number}", answer={"n": number}, id=f"task-{number}", metadata={"tags": ["x"]}
    )
    return Rollout(
        id=f"ro_{number}_{epoch}_{index}",
        task=task,
        index=index,
        epoch=epoch,
        items=[Message(role="user", content=f"question {number}"), Message(role="assistant", content=said)],
        input_items=1,
        model_calls=calls,
        reward=reward,
        timing=Timing(started_at=1_000_000.5, duration_s=2.0, model_s=1.5),
        **fields,
    )


def failed(number: int = 0, *, index: int = 0, stage: Stage = Stage.MODEL_CALL) -> Rollout:
    """A rollout that failed."""
    failure = Failure.of(ConnectionError("no route"), stage)
    return attempt(number, index=index, reward=None, outcome=Outcome.FAILED, failure=failure)


def key(number: int, index: int = 0, epoch: int = 0) -> RolloutKey:
    """The key of `attempt(number, index=index, epoch=epoch)`."""
    return RolloutKey(f"task-{number}", epoch, index)
