"""What a verifier is, and how one is run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from gym_sdk.calling import call_function, name_of
from gym_sdk.errors import VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers.faults import verifier_faults
from gym_sdk.verifiers.results import as_reward

__all__ = [
    "Verifier",
    "VerifierResult",
    "answers_of",
    "named",
    "run_verifier",
    "verifier_name",
    "view_of",
]

VerifierResult: TypeAlias = float | int | bool | Reward | Mapping[str, float]
"""A number; a `Reward`; or named components, which are summed unless one of them is called `reward`."""

Verifier: TypeAlias = Callable[[Rollout], Awaitable[VerifierResult] | VerifierResult]
"""Scores a rollout. A coroutine function runs on the event loop, a plain function in a worker thread."""


def verifier_name(verifier: Callable[..., Any]) -> str:
    """What to call a verifier in messages: the function's name."""
    return name_of(verifier)


async def run_verifier(verifier: Verifier, rollout: Rollout) -> Reward:
    """Score a rollout.

    A mapping's value is its entry `reward` if it has one, with the others as components that do not
    count; otherwise it is the sum of all entries.

    The verifier is given a view of the rollout (see `view_of`). Cancellation is passed on to it; a deadline
    is the caller's.

    Args:
        verifier: coroutine function or plain function; a plain function runs in a worker thread, which is
            left behind if the caller is cancelled.
        rollout: what to score.

    Raises:
        VerifierError: the verifier raised, or returned something that is not a finite number. It is never
            turned into a reward of zero.
    """
    name = verifier_name(verifier)
    with verifier_faults(name):
        return as_reward(await call_function(verifier, view_of(rollout)), name)


def view_of(rollout: Rollout) -> Rollout:
    """Return what a verifier gets: a copy of the rollout with lists and components of its own.

    Setting a field, or adding and removing items or model calls, does not reach the rollout that is kept
    and trained on. `metrics` is the rollout's own: a verifier may add to it. The task, the items and the
    tokens themselves are shared, since copying them would cost more than most verifiers; they are to be read.
    """
    return rollout.model_copy(
        update={
            "items": list(rollout.items),
            "model_calls": list(rollout.model_calls),
            "reward_components": dict(rollout.reward_components),
        }
    )


def named(name: str, function: Callable[[Rollout], Any]) -> Verifier:
    """Give a verifier that a factory made the name that messages show."""
    function.__name__ = function.__qualname__ = name
    return function


def answers_of(rollout: Rollout, verifier: str) -> list[str]:
    """The texts that count as the task's answer: a list stands for several, a number for its JSON text.

    Raises:
        VerifierError: the task has no answer, or one that has no plain text.
    """
    answer = rollout.task.answer
    entries = list(answer) if isinstance(answer, list | tuple) else [answer]
    texts = [text for text in map(_text, entries) if text is not None]
    if not texts or len(texts) != len(entries):
        found = "no answer" if answer is None else f"the answer {answer!r:.80}"
        raise VerifierError(
            f"verifier {verifier}: task {rollout.task_id!r} has {found}; expected text, a number, "
            "or a list of these",
            verifier=verifier,
        )
    return texts


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else None
