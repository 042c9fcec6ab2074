"""Arithmetic questions, worded as reasoning-gym words them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from random import Random

__all__ = ["Question", "ask_basic_arithmetic", "ask_chain_sum", "basic_arithmetic", "chain_sum", "evaluate"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        text: what the user asks.
        expression: the arithmetic expression inside it.
        answer: what the expression is worth.
    """

    text: str
    expression: str
    answer: int


def chain_sum(rng: Random) -> Question:
    """Make a sum of 2 or 3 terms of 1 or 2 digits, like the `chain_sum` of reasoning-gym."""
    digits = rng.randint(1, 2)
    smallest = 0 if digits == 1 else 10 ** (digits - 1)
    parts = [str(rng.randint(smallest, 10**digits - 1))]
    for _ in range(rng.randint(2, 3) - 1):
        parts += [rng.choice("+-"), str(rng.randint(smallest, 10**digits - 1))]
    expression = " ".join(parts)
    return _question(ask_chain_sum(expression), expression)


def basic_arithmetic(rng: Random) -> Question:
    """Make 2 to 4 terms of one digit with signs and brackets, like reasoning-gym's `basic_arithmetic`.

    Its answer is an integer.
    """
    while True:
        expression = " ".join(_terms(rng, rng.randint(2, 4)))
        if evaluate(expression) is not None:
            return _question(ask_basic_arithmetic(expression), expression)


def ask_chain_sum(expression: str) -> str:
    """Word a question of `chain_sum`."""
    return f"State the final answer to the following arithmetic problem: {expression} ="


def ask_basic_arithmetic(expression: str) -> str:
    """Word a question of `basic_arithmetic`."""
    return f"Calculate {expression}."


def evaluate(expression: str) -> int | None:
    """Evaluate an expression that this module made; None if it is worth no integer, or divides by zero."""
    exact = re.sub(r"\d+", r"number(\g<0>)", expression)
    try:
        value = eval(exact, {"__builtins__": {}, "number": Fraction})
    except ZeroDivisionError:
        return None
    return int(value) if value.denominator == 1 else None


def _question(text: str, expression: str) -> Question:
    answer = evaluate(expression)
    assert answer is not None
    return Question(text, expression, answer)


def _terms(rng: Random, count: int) -> list[str]:
    """Write `count` terms, the left part in brackets half of the time."""
    left = rng.randint(1, count)
    if left > 1 and rng.random() < 0.5:
        parts = [rng.choice(["(", "-("]), *_terms(rng, left), ")"]
    else:
        parts = [_digit(rng)]
        for _ in range(left - 1):
            parts += [_operator(rng), _digit(rng)]
    if left < count:
        parts += [_operator(rng), *_terms(rng, count - left)]
    return parts


def _digit(rng: Random) -> str:
    return str(rng.randint(-9, 9))


def _operator(rng: Random) -> str:
    # Division is drawn twice as often, since most quotients are no integer and are drawn again.
    return rng.choice("+-*//")
