"""Turns as text in which each special token is one character, so that they can be cut and compared."""

from __future__ import annotations

import re
from collections.abc import Sequence

from backends.constraints.lark import literal, token
from backends.rendering.template import TemplateRenderer

__all__ = ["Alphabet"]

_FIRST = 0x100000
"""The last of Unicode's private planes: neither templates nor probes write it."""
_MARK = re.compile("[\U00100000-\U0010fffd]")


class Alphabet:
    """Writes ids as text, each special token as one private character; and that as a grammar's expression.

    Args:
        renderer: the tokenizer.
    """

    def __init__(self, renderer: TemplateRenderer) -> None:
        self._renderer = renderer
        ids = renderer.special.ids
        # some tokenizers have runs of white space among their added tokens: those are text
        self._chars = {ids[text]: chr(_FIRST + n) for n, text in enumerate(sorted(ids)) if text.strip()}
        self._ids = {char: token_id for token_id, char in self._chars.items()}

    def write(self, token_ids: Sequence[int]) -> str:
        """Return ids as text."""
        text = ""
        start = 0
        for index, token_id in enumerate(token_ids):
            if token_id in self._chars:
                text += self._renderer.decode(token_ids[start:index]) + self._chars[token_id]
                start = index + 1
        return text + self._renderer.decode(token_ids[start:])

    def ids(self, text: str) -> list[int]:
        """Return text as ids."""
        return [token_id for piece in _pieces(text) for token_id in self._encode(piece)]

    def mark(self, text: str) -> str:
        """Return a mark as it stands in a turn: a private character if it is a token, else its spelling."""
        token_id = self._renderer.special.ids.get(text)
        return text if token_id is None else self._chars.get(token_id, text)

    def is_token(self, mark: str) -> bool:
        """Whether a mark, as it stands in a turn, is a token."""
        return mark in self._ids

    def expression(self, text: str) -> str:
        """Return a grammar's expression for a text."""
        return " ".join(
            token(self._ids[piece]) if piece in self._ids else literal(piece) for piece in _pieces(text)
        )

    def _encode(self, piece: str) -> list[int]:
        return [self._ids[piece]] if piece in self._ids else self._renderer.encode(piece)


def _pieces(text: str) -> list[str]:
    """Cut a text before and after each private character."""
    pieces: list[str] = []
    start = 0
    for match in _MARK.finditer(text):
        pieces += [text[start : match.start()], match.group()]
        start = match.end()
    return [piece for piece in [*pieces, text[start:]] if piece]
