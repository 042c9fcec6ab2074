"""Whether a prompt left thinking open."""

# ruff: noqa: RUF001 - DeepSeek spells its tokens with full-width bars

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from backends.rendering.parsing.base import Decoder
from backends.rendering.parsing.pieces import Marks

__all__ = ["LOOK", "ThinkingLook", "last_turn"]

LOOK = 2048
"""How many ids of a prompt are looked at, at most."""

_TURN = re.compile(
    r"<[|｜].+[|｜]>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|</?s>"
    r"|<\|(?:turn|tool_response)>|<(?:turn|tool_response)\|>|\]~b\]|\[e~\["
)
"""How the field spells the tokens around turns: `<|im_start|>`, `<｜Assistant｜>`, `[/INST]`, `<|turn>`, …"""


class ThinkingLook:
    """Looks at the end of a prompt for thinking that its generation prompt opened and did not close.

    Args:
        tokenizer: decodes ids.
        pairs: opening marks of thinking and what closes them.
        stop_token_ids: tokens that end a turn.
    """

    def __init__(self, tokenizer: Decoder, pairs: Mapping[str, str], stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._pairs = pairs
        self._stop_token_ids = stop_token_ids
        self._marks = Marks(tokenizer, [*pairs.keys(), *pairs.values()])

    def opened_by(self, prompt: Sequence[int]) -> str | None:
        """Return the opening mark of the thinking that the prompt left open, or None."""
        turn = last_turn(self._tokenizer, prompt, self._stop_token_ids, self._marks.token_ids)
        opened: str | None = None
        for piece in self._marks.split(turn):
            if piece.mark in self._pairs:
                opened = opened or piece.mark
            elif opened and piece.mark == self._pairs[opened]:
                opened = None
        return opened


def last_turn(
    tokenizer: Decoder, prompt: Sequence[int], stop_token_ids: frozenset[int], within: Collection[int]
) -> Sequence[int]:
    """Return the ids after the last token that stands at a turn's border.

    Args:
        tokenizer: names ids.
        prompt: looked at from its end, for a bounded number of ids.
        stop_token_ids: tokens that end a turn.
        within: ids that look like a border and are none.
    """
    first = max(0, len(prompt) - LOOK)
    for index in range(len(prompt) - 1, first - 1, -1):
        number = prompt[index]
        if number in within:
            continue
        if number in stop_token_ids or _TURN.fullmatch(tokenizer.convert_ids_to_tokens(number) or ""):
            return prompt[index + 1 :]
    return prompt[first:]
