"""Google-style docstrings: the description, and one text per argument."""

from __future__ import annotations

import inspect
import re
from itertools import pairwise

__all__ = ["parse_docstring"]

_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Returns?|Yields?|Raises|Examples?|Notes?|Attributes|References|See Also"
    r"|Warnings?|Todo):\s*$"
)
_ARGUMENT_SECTIONS = {"Args", "Arguments", "Parameters"}
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\(.*?\))?:\s*(.*)$")


def parse_docstring(text: str | None) -> tuple[str | None, dict[str, str]]:
    """Split a docstring.

    Args:
        text: a docstring as it stands in the source, or None.

    Returns:
        The text before the first section (None if there is none), and the text of each argument. Lines
        of one argument are joined by spaces.
    """
    if not text:
        return None, {}
    lines = inspect.cleandoc(text).splitlines()
    starts = [number for number, line in enumerate(lines) if _SECTION.match(line)]
    description = "\n".join(lines[: starts[0]] if starts else lines).strip()
    arguments: dict[str, str] = {}
    for start, end in pairwise([*starts, len(lines)]):
        if lines[start].partition(":")[0] in _ARGUMENT_SECTIONS:
            arguments.update(_parse_arguments(lines[start + 1 : end]))
    return description or None, arguments


def _parse_arguments(lines: list[str]) -> dict[str, str]:
    arguments: dict[str, list[str]] = {}
    current: list[str] | None = None
    margin: int | None = None
    for line in lines:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        margin = indent if margin is None else margin
        entry = _ARGUMENT.match(line.strip()) if indent <= margin else None
        if entry is not None:
            current = arguments.setdefault(entry[1], [])
            current.append(entry[2])
        elif current is not None:
            current.append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in arguments.items()}
