"""Sums with a calculator: ask it and repeat its result."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any, ClassVar

from backends.tiny.families.calculator import CALCULATOR_TOOL
from backends.tiny.families.protocol import Messages, check_shares
from backends.tiny.families.questions import Question, basic_arithmetic, chain_sum, evaluate
from backends.tiny.vocabulary import ARITHMETIC, Vocabulary

__all__ = ["ArithmeticMix", "ArithmeticTrace", "arithmetic_trace"]

_DRILLS_ON_RESULTS = 0.35
_DRILLS_ON_BRACKETS = 0.3


class ArithmeticTrace(StrEnum):
    """What the assistant does in a trace."""

    GOOD = "good"
    """It asks the calculator and repeats the result."""
    GUESS = "guess"
    """It answers at once with a number of the question."""
    WRONG_EXPRESSION = "wrong_expression"
    """It asks the calculator something else: an operator flipped, or the last term dropped."""


@dataclass(frozen=True, slots=True)
class ArithmeticMix:
    """Shares of the traces.

    Attributes:
        good: ask the calculator, repeat its result.
        guess: answer at once with a number of the question.
        wrong_expression: ask the calculator something else.
        basic_arithmetic: share of each of these that is about signs and brackets instead of sums.

    Raises:
        ConfigurationError: the first three don't add up to 1, or a share is not in [0, 1].
    """

    family: ClassVar[str] = "arithmetic"
    vocabulary: ClassVar[Vocabulary] = ARITHMETIC
    tool: ClassVar[dict[str, Any] | None] = CALCULATOR_TOOL

    good: float = 0.25
    guess: float = 0.6
    wrong_expression: float = 0.15
    basic_arithmetic: float = 0.25

    def __post_init__(self) -> None:
        check_shares(self, "good", "guess", "wrong_expression")

    def drill(self, rng: Random) -> list[str]:
        """Write an expression or a result three times: tool calls and answers are copies of these."""
        family = basic_arithmetic if rng.random() < _DRILLS_ON_BRACKETS else chain_sum
        question = family(rng)
        text = str(question.answer) if rng.random() < _DRILLS_ON_RESULTS else question.expression
        return [text] * 3

    def traces(self, rng: Random) -> Iterator[Messages]:
        """Yield conversations in the mix's proportions, without end."""
        kinds = list(ArithmeticTrace)
        weights = [self.good, self.guess, self.wrong_expression]
        while True:
            family = basic_arithmetic if rng.random() < self.basic_arithmetic else chain_sum
            yield arithmetic_trace(rng, rng.choices(kinds, weights)[0], family(rng))


def arithmetic_trace(rng: Random, kind: ArithmeticTrace, question: Question) -> Messages:
    """Write a conversation of one kind about a question."""
    messages: Messages = [{"role": "user", "content": question.text}]
    if kind is ArithmeticTrace.GUESS:
        # A number of the question, not any number: random digits are noise that nothing can learn.
        answer = rng.choice(re.findall(r"\d+", question.expression))
    else:
        good = kind is ArithmeticTrace.GOOD
        expression = question.expression if good else _distort(rng, question)
        answer = str(evaluate(expression))
        messages += _tool_turn(expression, answer)
    messages.append({"role": "assistant", "content": f"The answer is {answer}."})
    return messages


def _tool_turn(expression: str, result: str) -> Messages:
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
