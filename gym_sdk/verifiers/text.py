"""Verifiers that compare text."""

from __future__ import annotations

import re

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers.protocol import Verifier, answers_of, named

__all__ = ["compile_pattern", "contains", "exact", "last_match", "regex"]


def exact(*, strip: bool = True, casefold: bool = False) -> Verifier:
    """Make a verifier: 1 if the final text is the task's answer (or one of them, if it is a list).

    Args:
        strip: ignore white space around both.
        casefold: ignore upper and lower case.
    """

    async def verify(rollout: Rollout) -> float:
        text = _normal(rollout.output_text, strip, casefold)
        return float(any(text == _normal(answer, strip, casefold) for answer in answers_of(rollout, "exact")))

    return named("exact", verify)


def contains(*, casefold: bool = False) -> Verifier:
    """Make a verifier: 1 if the task's answer (or one of them) stands in the final text as whole words.

    `5` is not found in `15` or `2.5`, nor `art` in `part`. An empty answer is found nowhere.

    Args:
        casefold: ignore upper and lower case.
    """

    async def verify(rollout: Rollout) -> float:
        text = _normal(rollout.output_text, False, casefold)
        answers = [_normal(answer, True, casefold) for answer in answers_of(rollout, "contains")]
        return float(any(_stands_in(answer, text) for answer in answers if answer))

    return named("contains", verify)


def _stands_in(answer: str, text: str) -> bool:
    before = r"(?<!\w)(?<!\d[.,])" if answer[0].isalnum() else ""
    if answer[0].isdigit():
        before += r"(?<![-\u2212])"
    after = r"(?!\w)(?![.,]\d)" if answer[-1].isalnum() else ""
    return re.search(before + re.escape(answer) + after, text) is not None


def regex(
    pattern: str, group: int | str | None = None, *, fullmatch: bool = False, flags: int = 0
) -> Verifier:
    """Make a verifier: 1 if what a pattern captures in the final text is the task's answer.

    White space around the captured text and the answer is ignored. Of several matches the last one counts.

    Args:
        pattern: a Python regular expression.
        group: which group to compare; by default the first, or the whole match if there is none.
        fullmatch: whether the pattern must match the whole text.
        flags: flags of `re`.

    Raises:
        ConfigurationError: the pattern is not valid, or has no such group.
    """
    compiled, group = compile_pattern(pattern, group, flags)

    async def verify(rollout: Rollout) -> float:
        answers = answers_of(rollout, "regex")
        text = rollout.output_text
        found = compiled.fullmatch(text) if fullmatch else last_match(compiled, text)
        captured = found[group] if found else None
        return float(captured is not None and captured.strip() in {answer.strip() for answer in answers})

    return named("regex", verify)


def compile_pattern(
    pattern: str, group: int | str | None = None, flags: int = 0
) -> tuple[re.Pattern[str], int | str]:
    """Compile a user's pattern and check its group.

    Raises:
        ConfigurationError: the pattern is not valid, or has no such group.
    """
    try:
        compiled = re.compile(pattern, flags)
    except re.error as error:
        raise ConfigurationError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
    chosen = min(compiled.groups, 1) if group is None else group
    known = chosen in compiled.groupindex if isinstance(chosen, str) else 0 <= chosen <= compiled.groups
    if not known:
        raise ConfigurationError(f"the pattern {pattern!r} has no group {chosen!r}")
    return compiled, chosen


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last of a pattern's matches: models reason first and answer last."""
    found = None
    for match in pattern.finditer(text):
        found = match
    return found


def _normal(text: str, strip: bool, casefold: bool) -> str:
    text = text.strip() if strip else text
    return text.casefold() if casefold else text
