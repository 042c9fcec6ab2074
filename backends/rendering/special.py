"""The special tokens of a tokenizer: where text is cut before it is tokenized."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpecialTokens"]


class SpecialTokens:
    """The added tokens of a tokenizer, which it finds in text before anything else.

    What stands on the two sides of such a token is tokenized apart, so a cut there changes no token.

    Args:
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self.ids: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.eat_before = frozenset(token.content for token in added.values() if token.lstrip)
        self.eat_after = frozenset(token.content for token in added.values() if token.rstrip)
        longest_first = sorted(self.ids, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if self.ids else None

    def __contains__(self, text: object) -> bool:
        return text in self.ids

    def split(self, text: str) -> list[str]:
        """Cut text before and after each special token; the pieces join to the text."""
        pieces: list[str] = []
        start = 0
        for begin, end in self.spans(text):
            if begin > start:
                pieces.append(text[start:begin])
            pieces.append(text[begin:end])
            start = end
        if start < len(text):
            pieces.append(text[start:])
        return pieces

    def next(self, text: str, start: int = 0) -> tuple[int, int] | None:
        """Return start and end of the first special token from `start` on."""
        match = self._pattern.search(text, start) if self._pattern else None
        return match.span() if match else None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return start and end of each special token in the text."""
        return [match.span() for match in self._pattern.finditer(text)] if self._pattern else []

    def occur_in(self, text: str) -> bool:
        """Whether the text holds the characters of a special token."""
        return self.next(text) is not None
