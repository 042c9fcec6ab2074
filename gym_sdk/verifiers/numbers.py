"""Numbers in text, read exactly."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers.protocol import Verifier, answers_of, named

__all__ = ["last_number", "numeric"]

_MINUS = "-\u2212\u2013"  # hyphen-minus, minus sign, en dash
_GROUPED = r"[0-9]{1,3}(?:[,\u2009\u202f][0-9]{3})+(?![0-9])"
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![)\]])(?P<sign>[{_MINUS}+]))?[$\u20ac\u00a3]?"
    rf"(?P<value>(?:{_GROUPED}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?P<exponent>[eE][{_MINUS}+]?[0-9]+)?"
    r"(?:\s?/\s?(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
    r"(?P<percent>\s?%)?"
)
_SEPARATORS = str.maketrans("", "", ",\u2009\u202f")
_TO_HYPHEN = str.maketrans(dict.fromkeys(_MINUS, "-"))
_MAX_LENGTH = 400
_MAX_EXPONENT = len("e-999")  # beyond it, the exact value would be a number of a million digits


def last_number(text: str) -> Fraction | None:
    """Read the last number of a text, exactly.

    Understood: `-3`, U+2212 and the en dash as minus, `1,234.5` and thin spaces as thousands separators,
    `.5`, `1e-3`, `3/4`, `50%` (one half), and a currency sign before the digits. A minus after a digit,
    letter or bracket is an operator: the last number of `7-3` is 3. Digits inside words do not count (`H2O`),
    nor do numbers of more than 400 characters or exponents of more than 3 digits. A decimal comma is not
    understood.

    Returns:
        The number, or None if there is none.
    """
    found: Fraction | None = None
    for match in _NUMBER.finditer(text):
        if len(match[0]) <= _MAX_LENGTH and len(match["exponent"] or "") <= _MAX_EXPONENT:
            found = _value(match)
    return found


def _value(match: re.Match[str]) -> Fraction:
    value = Fraction(match["value"].translate(_SEPARATORS))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"][1:].translate(_TO_HYPHEN))
    if match["divisor"] and Fraction(match["divisor"]):
        value /= Fraction(match["divisor"])
    if match["percent"]:
        value /= 100
    return -value if match["sign"] and match["sign"] != "+" else value


def numeric(*, tolerance: float = 1e-6, relative: float = 0.0) -> Verifier:
    """Make a verifier: 1 if the last number of the final text is the task's answer.

    The answer is a number, or text whose last number counts (see `last_number`); a list stands for several
    accepted answers.

    Args:
        tolerance: greatest absolute difference.
        relative: greatest difference as a share of the answer; the more generous of the two decides.

    Raises:
        ConfigurationError: a tolerance is negative or not finite.
    """
    for limit in (tolerance, relative):
        if not (math.isfinite(limit) and limit >= 0):
            raise ConfigurationError(f"numeric: a tolerance must be finite and not negative, not {limit}")
    absolute, share = Fraction(tolerance), Fraction(relative)

    async def verify(rollout: Rollout) -> float:
        targets = [_target(rollout, text) for text in answers_of(rollout, "numeric")]
        found = last_number(rollout.output_text)
        if found is None:
            return 0.0
        return float(any(abs(found - target) <= max(absolute, share * abs(target)) for target in targets))

    return named("numeric", verify)


def _target(rollout: Rollout, text: str) -> Fraction:
    target = last_number(text)
    if target is None:
        raise VerifierError(
            f"verifier numeric: the answer {text!r:.80} of task {rollout.task_id!r} has no number in it",
            verifier="numeric",
        )
    return target
