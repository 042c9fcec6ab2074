"""How a judge is told to answer, and how its answer is read: never by guessing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from gym_sdk.errors import ConfigurationError
from gym_sdk.verifiers.protocol import VerifierResult
from gym_sdk.verifiers.text import last_match

__all__ = ["AnswerFormat", "Parse", "choice", "json_field", "score"]

Parse: TypeAlias = "AnswerFormat | Callable[[str], VerifierResult | None]"
"""Reads a judge's answer. None or a `ValueError` says that it cannot be read: the judge is asked again."""

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_SCORE_LINE = re.compile(r"^.*\bscore[^\w\n:=]{0,9}[:=](.*)$", re.IGNORECASE | re.MULTILINE)
_VERDICT_LINE = re.compile(r"^.*\bverdict[^\w\n:=]{0,9}[:=](.*)$", re.IGNORECASE | re.MULTILINE)
_WRAPPING = " \t\r\n*_`\"'[](){}<>:$"
_MOST_CHARACTERS = 20_000  # of an answer's end, in which a verdict is looked for: this runs on the event loop
_MOST_FAILURES = 100


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What the judge is asked for, and the function that reads it."""

    asks: str
    """The sentence that ends the prompt."""
    read: Callable[[str], float]
    """Raises `ValueError` with the reason if an answer is not of this form."""

    def __call__(self, text: str) -> float:
        """Read an answer.

        Raises:
            ValueError: it is not of this form.
        """
        return self.read(text)


def score(low: float = 0.0, high: float = 10.0) -> AnswerFormat:
    """Read the last line `Score: N`, with N from `low` to `high`; the reward is (N - low) / (high - low).

    `Score: 7/10` is understood if `high` is 10. An answer that is nothing but a number counts, too. Other
    numbers of the text don't: the last number of "7 out of 10" is 10.

    Raises:
        ConfigurationError: the bounds are not finite and in order.
    """
    _check_bounds("score", low, high)
    form = re.compile(rf"({_NUMBER})(?:\s?(?:/|out of)\s?{re.escape(f'{high:g}')}(?:\.0)?)?")

    def read(text: str) -> float:
        found = form.fullmatch(_said(text, _SCORE_LINE))
        if found is None:
            raise ValueError("there is no line `Score: N`")
        return _scaled(float(found[1]), low, high)

    return AnswerFormat(
        f"End with a line of the form `Score: N`, where N is a number from {low:g} to {high:g}.", read
    )


def choice(values: Mapping[str, float]) -> AnswerFormat:
    """Read the last line `Verdict: X`; the reward is what X stands for. Upper and lower case are the same.

    An answer that is nothing but one of the choices counts, too.

    Args:
        values: rewards by choice, e.g. `{"correct": 1.0, "wrong": 0.0}`.

    Raises:
        ConfigurationError: fewer than two choices, two that read the same, or a value that is not finite.
    """
    known = {_bare(name).casefold(): float(value) for name, value in values.items()}
    if len(known) < 2 or len(known) != len(values) or "" in known:
        raise ConfigurationError(f"choice needs at least two choices that differ, not {list(values)!r:.200}")
    if not all(map(math.isfinite, known.values())):
        raise ConfigurationError(f"choice: a value of {dict(values)!r:.200} is not finite")

    def read(text: str) -> float:
        said = _said(text, _VERDICT_LINE).casefold()
        if said not in known:
            raise ValueError(f"there is no line `Verdict: X` with one of {', '.join(values)}")
        return known[said]

    *others, last = values
    return AnswerFormat(
        f"End with a line of the form `Verdict: X`, where X is {', '.join(others)} or {last}.", read
    )


def json_field(field: str = "score", low: float = 0.0, high: float = 1.0) -> AnswerFormat:
    """Read a number from the last JSON object that has the field; the reward is (N - low) / (high - low).

    Text around the object, such as a code fence, does not matter.

    Raises:
        ConfigurationError: the bounds are not finite and in order.
    """
    _check_bounds("json_field", low, high)

    def read(text: str) -> float:
        values = [entry[field] for entry in _objects(_end(text)) if field in entry]
        if not values:
            raise ValueError(f"there is no JSON object with the field {field!r}")
        if not isinstance(values[-1], int | float):
            raise ValueError(f"the field {field!r} is no number")
        return _scaled(values[-1], low, high)

    return AnswerFormat(
        f"End with a JSON object whose field {json.dumps(field)} is a number from {low:g} to {high:g}.", read
    )


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects that stand in a text, the outer ones only.

    Raises:
        ValueError: it is full of braces that begin none; each costs time.
    """
    decoder = json.JSONDecoder()
    failures = 0
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            failures, end = failures + 1, start + 1
            if failures > _MOST_FAILURES:
                raise ValueError("there is no JSON object that could be told from the rest") from None
        else:
            yield value
        start = text.find("{", end)


def _said(text: str, line: re.Pattern[str]) -> str:
    """Return what the last such line says, else the whole text; without what emphasises it."""
    found = last_match(line, _end(text))
    return _bare(found[1] if found else text)


def _bare(text: str) -> str:
    return text.lstrip(_WRAPPING).rstrip(_WRAPPING + ".,;!")


def _end(text: str) -> str:
    return text[-_MOST_CHARACTERS:]


def _scaled(value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError(f"{value!r:.20} is not between {low:g} and {high:g}")
    return float((value - low) / (high - low))


def _check_bounds(what: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigurationError(f"{what}: low must be less than high, and both finite, not {low} and {high}")
