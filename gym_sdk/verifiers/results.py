"""What a verifier returned, as a reward; whatever is none is refused by name."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping
from numbers import Real
from typing import Any

from gym_sdk.errors import VerifierError
from gym_sdk.schema import Reward

__all__ = ["as_reward"]

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80


def as_reward(result: Any, name: str, *, at: str = "") -> Reward:
    """Read a result.

    Args:
        result: a number (also a scalar of numpy or torch), a `Reward`, or named components.
        name: the verifier's.
        at: where in a longer result this stands, for messages.

    Raises:
        VerifierError: it is anything else, or a number is not finite.
    """
    return _Reading(name, at).reward(result)


class _Reading:
    """Reads one result; knows whose it is."""

    def __init__(self, name: str, at: str) -> None:
        self._name = name
        self._at = at

    def reward(self, result: Any) -> Reward:
        if isinstance(result, Reward):
            components = {key: self._number(value, key) for key, value in result.components.items()}
            return Reward(value=self._number(result.value), components=components)
        if not isinstance(result, Mapping):
            return Reward(value=self._number(result))
        if not result:
            raise self._error("returned an empty mapping; it has no reward")
        components = {}
        for key, value in result.items():
            if not isinstance(key, str):
                raise self._error(f"returned a component named {_SHOWN.repr(key):.120}")
            components[key] = self._number(value, key)
        if "reward" in components:
            return Reward(value=components.pop("reward"), components=components)
        return Reward(value=self._number(sum(components.values())), components=components)

    def _number(self, value: Any, component: str | None = None) -> float:
        value = _unboxed(value)
        if not isinstance(value, Real):
            raise self._error(
                f"returned {_shown(value)}{_hint(value)}; expected a number, a bool, a Reward or named "
                "components",
                component,
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._error(f"returned {number}; a reward is finite", component)
        return number

    def _error(self, what: str, component: str | None = None) -> VerifierError:
        part = f"component {component!r} of " if component else ""
        return VerifierError(f"{part}verifier {self._name}{self._at} {what}", verifier=self._name)


def _unboxed(value: Any) -> Any:
    """Take the number out of a scalar of numpy or torch; numpy's bool is no `Real`."""
    if isinstance(value, Real) or getattr(value, "ndim", None) != 0:
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _hint(value: Any) -> str:
    if inspect.iscoroutine(value):
        value.close()  # else Python warns, somewhere else, that it was never awaited
        return " (did it forget to await?)"
    return " (did it forget to return?)" if value is None else ""


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {_SHOWN.repr(value):.120}"
