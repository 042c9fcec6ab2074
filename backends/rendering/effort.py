"""What `reasoning.effort` means to a chat template, found out by trying."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from backends.rendering.chat_template import ChatTemplate
from gym_sdk.errors import PolicyError

__all__ = ["EFFORTS", "effort_settings"]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""The efforts of the Responses API."""

_LEVEL = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")
_USUAL = ("low", "medium", "high")
"""What models know whose template prints the level as it comes."""


def effort_settings(template: ChatTemplate, effort: str) -> dict[str, Any]:
    """Return the template settings that ask for an effort.

    A template may have a switch for thinking, a flag such as `low_effort`, a level, or several of them. A
    level is passed on if the template names it, or, where it names no two of them, if it is one of the usual
    three.

    Args:
        template: the model's.
        effort: one of `EFFORTS`.

    Raises:
        PolicyError: the template has no setting for it; `param` is `reasoning.effort`.
    """
    if effort not in EFFORTS:
        raise PolicyError(
            f"there is no effort {effort!r}; choose one of {', '.join(EFFORTS)}",
            code="invalid_value",
            param="reasoning.effort",
        )
    switch = next((name for name in _SWITCHES if _matters(template, {name: False}, {name: True})), None)
    settings: dict[str, Any] = {} if switch is None else {switch: effort != "none"}
    flag = f"{effort}_effort"
    if _matters(template, {**settings, flag: False}, {**settings, flag: True}):
        return {**settings, flag: True}
    levels = _levels(template)
    if effort in levels:
        settings[_LEVEL] = effort
    elif switch is None or (levels and effort != "none"):
        known = ", ".join(level for level in EFFORTS if level in levels or (level == "none" and switch))
        raise PolicyError(
            f"this model's chat template has no effort {effort!r}; it has {known or 'no setting for it'}",
            code="unsupported_parameter",
            param="reasoning.effort",
        )
    return settings


def _levels(template: ChatTemplate) -> tuple[str, ...]:
    """Return the levels that the template takes."""
    named = tuple(level for level in EFFORTS if re.search(rf"(['\"]){level}\1", template.source))
    levels = named if len(named) > 1 else _USUAL
    low, high = ({_LEVEL: level} for level in (levels[0], levels[-1]))
    return levels if _matters(template, low, high) else ()


def _matters(template: ChatTemplate, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two settings make different prompts."""
    if not all(name in template.source for name in one):
        return False
    texts: list[str] = []
    for settings in (one, other):
        try:
            texts.append(
                template.render([{"role": "user", "content": "."}], settings=settings, generation_prompt=True)
            )
        except PolicyError:
            return False
    return texts[0] != texts[1]
