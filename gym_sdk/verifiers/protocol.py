"""What a verifier is, and how one is run."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from numbers import Real
from typing import Any, TypeAlias

from gym_sdk.calling import call_function, name_of
from gym_sdk.errors import VerifierError
from gym_sdk.schema import Reward, Rollout

__all__ = ["Verifier", "VerifierResult", "answers_of", "named", "run_verifier", "verifier_name"]

VerifierResult: TypeAlias = float | int | bool | Reward | Mapping[str, float]
"""A number; a `Reward`; or named components, which are summed unless one of them is called `reward`."""

Verifier: TypeAlias = Callable[[Rollout], Awaitable[VerifierResult] | VerifierResult]
"""Scores a rollout. A coroutine function runs on the event loop, a plain function in a worker thread."""


def verifier_name(verifier: Verifier) -> str:
    """What to call a verifier in messages: the function's name."""
    return name_of(verifier)


async def run_verifier(verifier: Verifier, rollout: Rollout) -> Reward:
    """Score a rollout.

    A mapping's value is its entry `reward` if it has one, with the others as components that do not
    count; otherwise it is the sum of all entries.

    Args:
        verifier: coroutine function or plain function; a plain function runs in a worker thread, which is
            left behind if the caller is cancelled.
        rollout: what to score.

    Raises:
        VerifierError: the verifier raised, or returned something that is not a finite number. It is never
            turned into a reward of zero.
    """
    name = verifier_name(verifier)
    try:
        result = await call_function(verifier, rollout)
    except VerifierError:
        raise
    except (Exception, SystemExit) as error:
        raise VerifierError(
            f"verifier {name} raised {type(error).__name__}: {error}", verifier=name
        ) from error
    return _as_reward(name, result)


def _as_reward(name: str, result: Any) -> Reward:
    if isinstance(result, Reward):
        components = {key: _number(name, value, key) for key, value in result.components.items()}
        return Reward(value=_number(name, result.value), components=components)
    if not isinstance(result, Mapping):
        return Reward(value=_number(name, result))
    if not result:
        raise VerifierError(f"verifier {name} returned an empty mapping; it has no reward", verifier=name)
    components = {}
    for key, value in result.items():
        if not isinstance(key, str):
            raise VerifierError(f"verifier {name} returned a component named {key!r}", verifier=name)
        components[key] = _number(name, value, key)
    if "reward" in components:
        return Reward(value=components.pop("reward"), components=components)
    return Reward(value=_number(name, sum(components.values())), components=components)


def _number(name: str, value: Any, component: str | None = None) -> float:
    what = f"component {component!r} of verifier {name}" if component else f"verifier {name}"
    if not isinstance(value, Real):
        hint = " (did it forget to return?)" if value is None and not component else ""
        raise VerifierError(
            f"{what} returned {_shown(value)}{hint}; expected a number, a bool, a Reward or named components",
            verifier=name,
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise VerifierError(f"{what} returned {number}; a reward is finite", verifier=name)
    return number


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"


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
