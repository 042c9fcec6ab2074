"""Comparing mathematical expressions with math-verify. Only worker processes import this module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

__all__ = ["equal"]

logging.disable(logging.CRITICAL)  # math-verify and sympy tell of each text that they cannot parse


def equal(text: str, answers: Sequence[str]) -> bool:
    """Whether the last expression of the text equals one of the answers.

    Raises:
        ValueError: an answer is not a mathematical expression.
    """
    found = parse(text)
    same = False
    for answer in answers:
        expected = _parse_answer(answer)
        if not expected:
            raise ValueError(f"the answer {answer!r:.80} is not a mathematical expression")
        same = same or bool(found and verify(expected, found))
    return same


def _parse_answer(answer: str) -> list[Any]:
    """Parse an answer whole: without `$` math-verify would take the 2 of `2x+1` for it."""
    if "$" in answer or "\\boxed" in answer:
        return list(parse(answer))
    return list(parse(f"${answer}$") or parse(answer))
