"""Conversations to learn from, some deliberately poor, so that there is something left to learn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

from backends.tiny.questions import Question, basic_arithmetic, chain_sum, evaluate
from backends.tiny.recipe import TraceMix

__all__ = ["Trace", "TraceKind", "generate_traces", "make_trace"]


class TraceKind(StrEnum):
    """What the assistant does in a trace."""

    GOOD = "good"
    """It asks the calculator and repeats the result."""
    GUESS = "guess"
    """It answers at once with a number of the question."""
    WRONG_EXPRESSION = "wrong_expression"
    """It asks the calculator something else: an operator flipped, or the last term dropped."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One conversation.

    Attributes:
        messages: in the form of Chat Completions.
    """

    kind: TraceKind
    question: Question
    messages: list[dict[str, Any]]


def generate_traces(rng: Random, mix: TraceMix) -> Iterator[Trace]:
    """Yield traces in the mix's proportions, without end."""
    kinds = list(TraceKind)
    weights = [mix.good, mix.guess, mix.wrong_expression]
    while True:
        family = basic_arithmetic if rng.random() < mix.basic_arithmetic else chain_sum
        yield make_trace(rng, rng.choices(kinds, weights)[0], family(rng))


def make_trace(rng: Random, kind: TraceKind, question: Question) -> Trace:
    """Write a conversation of one kind about a question."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    if kind is TraceKind.GUESS:
        # A number of the question, not any number: random digits are noise that nothing can learn.
        answer = rng.choice(re.findall(r"\d+", question.expression))
    else:
        good = kind is TraceKind.GOOD
        expression = question.expression if good else _distort(rng, question)
        answer = str(evaluate(expression))
        messages += _tool_turn(expression, answer)
    messages.append({"role": "assistant", "content": f"The answer is {answer}."})
    return Trace(kind, question, messages)


def _tool_turn(expression: str, result: str) -> list[dict[str, Any]]:
    function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [call, {"role": "tool", "content": result}]


def _distort(rng: Random, question: Question) -> str:
    """Drop the last term or flip the first operator, where that gives another integer.

    If neither does, all but the first number is dropped.
    """
    text = question.expression
    candidates = []
    if shorter := re.fullmatch(r"([^()]+) [-+*/] \S+", text):
        candidates.append(shorter[1])
    if first := re.search(r" [-+*/] ", text):
        flipped = " + " if first[0] == " - " else " - "
        candidates.append(text[: first.start()] + flipped + text[first.end() :])
    useful = [other for other in candidates if evaluate(other) not in (None, question.answer)]
    return rng.choice(useful) if useful else re.findall(r"-?\d+", text)[0]
