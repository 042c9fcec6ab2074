"""How a model's format lays out calls and answers, read from turns that its template wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from backends.constraints.probes import ANSWER, KEYS, NAMES, THOUGHT, VALUES, WORD, Probes

__all__ = ["Answers", "Calls", "Parameters", "answer_layout", "call_layout"]

_OBJECT = re.compile(rf'\{{\s*"{KEYS[0]}"\s*:\s*{VALUES[0]}\s*\}}')
_EMPTY = re.compile(r"\{\s*\}")
_TAG = re.compile("\\s*(?:</[^<>]*>|[\U00100000-\U0010fffd])")
"""What closes a value that is written bare."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How arguments are laid out that are not one JSON object: one after the other, by name.

    Attributes:
        first: stands before the first parameter's name.
        naming: stands between a name and its value.
        value_end: closes a value that is written bare; empty if strings are quoted.
        between: stands between a value and the next name, after `value_end`.
        last: stands after the last value, after `value_end`.
        quotes: stand around a string; None: strings are bare, or JSON.
        ordered: whether the parameters stand in alphabetical order, not in the order of the schema.
    """

    first: str
    naming: str
    value_end: str
    between: str
    last: str
    quotes: tuple[str, str] | None
    ordered: bool

    def write(self, arguments: Sequence[tuple[str, str]]) -> str:
        """Write arguments whose values are given as text."""
        written = ""
        for index, (name, value) in enumerate(arguments):
            lead = self.between if index else self.first
            written += f"{lead}{name}{self.naming}{value}{self.value_end}"
        return written + self.last if arguments else ""


@dataclass(frozen=True, slots=True)
class Calls:
    """How calls are laid out. In `opening` and `between`, `NAMES[0]` stands for the function's name.

    Attributes:
        opening: stands before the first call's arguments.
        between: stands between the arguments of two calls; None if a turn has only one.
        closing: stands after the last call's arguments.
        stop: the token that ends the turn.
        parameters: how arguments are written; None: as a JSON object.
    """

    opening: str
    between: str | None
    closing: str
    stop: str
    parameters: Parameters | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """How answers are laid out.

    Attributes:
        opening: stands before the answer.
        closing: stands after it.
        stop: the token that ends the turn.
        thinking: what opens and closes thinking before an answer, in formats that think in messages.
    """

    opening: str
    closing: str
    stop: str
    thinking: tuple[str, str] | None = None


def answer_layout(probes: Probes) -> Answers | None:
    """Read how answers are laid out; None: the template writes none that can be found again."""
    said = probes.answer()
    if said is None or said[0].count(ANSWER) != 1:
        return None
    opening, closing = said[0].split(ANSWER)
    thinking: tuple[str, str] | None = None
    thought = probes.answer(THOUGHT)
    if thought is not None and THOUGHT in thought[0]:
        before, after = thought[0].split(THOUGHT, 1)
        closing_thought, found, _ = after.partition(opening + ANSWER)
        thinking = (before, closing_thought) if found else None
    return Answers(opening, closing, said[1], thinking)


def call_layout(probes: Probes) -> Calls | None:
    """Read how calls are laid out; None: the template writes none, or in a way that is not understood."""
    one = probes.calls({KEYS[0]: VALUES[0]})
    if one is None:
        return None
    text, stop = one
    two = probes.calls({KEYS[0]: VALUES[0]}, {KEYS[0]: VALUES[0]})
    found = _OBJECT.search(text)
    if found is None:
        return _by_name(probes, text, stop, two and two[0])
    between = None
    if two is not None and len(both := list(_OBJECT.finditer(two[0]))) == 2:
        between = two[0][both[0].end() : both[1].start()]
    return _calls(text[: found.start()], between, text[found.end() :], stop, None)


def _calls(
    opening: str, between: str | None, closing: str, stop: str, parameters: Parameters | None
) -> Calls | None:
    """Return the layout, if each call's name stands only before its arguments."""
    if NAMES[0] not in opening or NAMES[0] in closing:
        return None
    if between is not None and (NAMES[0] in between or NAMES[1] not in between):
        between = None
    between = between and between.replace(NAMES[1], NAMES[0])
    return Calls(opening, between, closing, stop, parameters)


def _by_name(probes: Probes, one: str, stop: str, calls: str | None) -> Calls | None:
    """Read a layout in which each argument has a place of its own.

    A call without arguments shows what belongs to the call, and what is left belongs to its parameters.
    """
    none = probes.calls({})
    values = list(zip(KEYS, VALUES, strict=True))
    pair, reverse = probes.calls(dict(values)), probes.calls(dict(reversed(values)))
    word = probes.calls({KEYS[0]: WORD})
    parts = _split(one, KEYS[:1], VALUES[:1])
    if none is None or pair is None or word is None or parts is None:
        return None
    before, naming, after = parts
    head = _common(none[0], before)
    tail = none[0][len(head) :]
    both = _split(pair[0], KEYS, VALUES)
    strings = _split(word[0], KEYS[:1], (WORD,))
    if both is None or strings is None or not after.endswith(tail):
        return None
    first, last = before[len(head) :], after.removesuffix(tail)
    shown = (before, naming, both[2], naming, after)
    quotes = _quotes(strings, (before, naming, after))
    if tuple(both) != shown or quotes is None:
        return None
    end = _TAG.match(both[2])
    value_end = end.group() if end and quotes == ("", "") else ""
    if quotes == ("", "") and not (value_end and last.startswith(value_end)):
        return None
    parameters = Parameters(
        first=first,
        naming=naming,
        value_end=value_end,
        between=both[2].removeprefix(value_end),
        last=last.removeprefix(value_end),
        quotes=None if quotes[0] in ("", '"') else quotes,
        ordered=pair == reverse,
    )
    between = None
    if calls is not None and calls.startswith(before) and calls.endswith(after):
        turns = _split(calls, (KEYS[0],) * 2, VALUES[:1] * 2)
        if turns is not None and turns[2].startswith(last) and turns[2].endswith(first):
            between = turns[2][len(last) : len(turns[2]) - len(first)]
    return _calls(head, between, tail, stop, parameters)


def _split(text: str, keys: Sequence[str], values: Sequence[int | str]) -> list[str] | None:
    """Cut a text at these keys and values, which alternate in it; None if they don't."""
    parts: list[str] = []
    for key, value in zip(keys, values, strict=True):
        for word in (key, str(value)):
            before, found, text = text.partition(word)
            if not found:
                return None
            parts.append(before)
    return [*parts, text]


def _quotes(strings: Sequence[str], numbers: Sequence[str]) -> tuple[str, str] | None:
    """Return what stands around a string and not around a number."""
    before, naming, after = strings
    if before != numbers[0] or not naming.startswith(numbers[1]) or not after.endswith(numbers[2]):
        return None
    return naming[len(numbers[1]) :], after[: len(after) - len(numbers[2])]


def _common(one: str, other: str) -> str:
    """Return the beginning that two texts share."""
    size = 0
    while size < min(len(one), len(other)) and one[size] == other[size]:
        size += 1
    return one[:size]
