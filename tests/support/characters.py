"""A tokenizer of single characters, for tests that write generations by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["EOS", "CharacterTokens"]

EOS = 1_000_000
_FIRST = 2_000_000


class CharacterTokens:
    """One id for each character, and an id of its own for each piece of markup."""

    def __init__(self, marks: Sequence[str] = ()) -> None:
        self.special = {mark: _FIRST + number for number, mark in enumerate(marks)}
        self._names = {number: mark for mark, number in self.special.items()}

    def encode(self, text: str) -> list[int]:
        if not self.special:
            return self.spell(text)
        longest = sorted(self.special, key=len, reverse=True)
        pieces = re.split("(" + "|".join(re.escape(mark) for mark in longest) + ")", text)
        ids: list[int] = []
        for piece in pieces:
            ids += [self.special[piece]] if piece in self.special else self.spell(piece)
        return ids

    @staticmethod
    def spell(text: str) -> list[int]:
        """Tokenize without markup."""
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(self._names.get(token) or chr(token) for token in token_ids)

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        return self.special.get(tokens)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])
