"""Where a generation starts in the tokens of a model call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends.rendering.families.history import USER

__all__ = ["generation_start", "openings_of"]

_CALL = {"id": "functions.qzv:0", "type": "function", "function": {"name": "qzv", "arguments": {"a": "b"}}}


def openings_of(renderer: Any) -> list[list[int]]:
    """Return the ids right before a generation starts, after a user's message and after a tool's.

    A family that goes on in the same turn after a tool's output has the output's closing token there.
    """
    turn = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    output = {"role": "tool", "tool_call_id": _CALL["id"], "name": "qzv", "content": "."}
    found: list[list[int]] = []
    for messages in ([dict(USER)], [dict(USER), turn, output]):
        try:
            rendered = renderer.render(messages, add_generation_prompt=True)
        except Exception:  # a family without tools
            continue
        ids, owners = list(rendered.token_ids), list(rendered.message_indices)
        length = next((n for n, owner in enumerate(reversed(owners)) if owner >= 0), len(owners))
        found.append(ids[len(ids) - max(length, 1) :])
    return found


def generation_start(known: Sequence[int], openings: Sequence[Sequence[int]]) -> int | None:
    """Return where the last generation in `known` starts: right after the last of the openings."""
    starts = [start for opening in openings if (start := _last_end(known, opening)) is not None]
    return max(starts, default=None)


def _last_end(known: Sequence[int], opening: Sequence[int]) -> int | None:
    """Return where the last occurrence of `opening` ends."""
    length = len(opening)
    for index in range(len(known) - length, -1, -1):
        if known[index] == opening[0] and list(known[index : index + length]) == list(opening):
            return index + length
    return None
