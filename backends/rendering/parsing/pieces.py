"""Ids into pieces: markup, and the text between."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from backends.rendering.parsing.base import Decoder

__all__ = ["Marks", "Piece", "text_of", "token_id"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for a character of which bytes are missing."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How vocabularies of SentencePiece name the tokens that are single bytes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Either markup (`mark`) or text.

    Attributes:
        text: what was sampled.
        tokens: how many tokens it took; an estimate where markup is spelled out of ordinary tokens.
        mark: the markup, if it is markup.
    """

    text: str
    tokens: int
    mark: str | None = None


class Marks:
    """Finds a set of marks in ids.

    Where the tokenizer has a mark as a token of its own, only that token counts: the same characters spelled
    out of ordinary tokens are text. Marks that the vocabulary lacks are found by their spelling.

    Args:
        tokenizer: decodes ids.
        marks: the markup to find.
    """

    def __init__(self, tokenizer: Decoder, marks: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._by_id: dict[int, str] = {}
        spelled: list[str] = []
        for mark in marks:
            number = token_id(tokenizer, mark)
            if number is None:
                spelled.append(mark)
            else:
                self._by_id[number] = mark
        # The longest first: one mark may begin another.
        spelled.sort(key=len, reverse=True)
        self._beginnings = frozenset(mark[:end] for mark in spelled for end in range(1, len(mark)))
        self._spelled = re.compile("|".join(re.escape(mark) for mark in spelled)) if spelled else None

    @property
    def token_ids(self) -> Collection[int]:
        """The ids of the marks that are tokens."""
        return self._by_id.keys()

    def split(self, token_ids: Sequence[int], *, partial: bool = False) -> list[Piece]:
        """Split ids into pieces; their texts joined are the decoded ids.

        Args:
            token_ids: what to split.
            partial: whether other ids follow. Of the last text only what they leave as it is becomes a piece.
        """
        pieces: list[Piece] = []
        start = 0
        for index, number in enumerate(token_ids):
            mark = self._by_id.get(number)
            if mark is not None:
                pieces += self._split_text(token_ids, start, index)
                pieces.append(Piece(mark, 1, mark))
                start = index + 1
        pieces += self._split_text(token_ids, start, len(token_ids), partial=partial)
        return pieces

    def since(self, token_ids: Sequence[int], mark: str) -> Sequence[int]:
        """Return the ids from the last token on that is this mark, or all of them if none is."""
        for index in range(len(token_ids) - 1, -1, -1):
            if self._by_id.get(token_ids[index]) == mark:
                return token_ids[index:]
        return token_ids

    def _split_text(
        self, token_ids: Sequence[int], begin: int, end: int, *, partial: bool = False
    ) -> Iterator[Piece]:
        """Split the ids between two marks that are tokens, or the ends."""
        if partial:
            end = self._end_of_characters(token_ids, begin, end)
        if begin == end:
            return
        text = self._decode(token_ids, begin, end)
        if partial:
            text = text.rstrip(_BROKEN)
        count = end - begin
        start = 0
        for match in self._spelled.finditer(text) if self._spelled else ():
            if match.start() > start:
                yield Piece(text[start : match.start()], round(count * (match.start() - start) / len(text)))
            yield Piece(match.group(), 1, match.group())
            start = match.end()
        if partial:
            text = text[: self._beginning_of_mark(text, start)]
        if start < len(text):
            yield Piece(text[start:], round(count * (len(text) - start) / len(text)))

    def _end_of_characters(self, token_ids: Sequence[int], begin: int, end: int) -> int:
        """Return where the row of bytes begins with which the ids end.

        SentencePiece decodes such a row as a whole: one wrong byte spoils the characters before it.
        """
        name = self._tokenizer.convert_ids_to_tokens
        while end > begin and _BYTE.fullmatch(name(token_ids[end - 1]) or ""):
            end -= 1
        return end

    def _beginning_of_mark(self, text: str, start: int) -> int:
        """Return where text from `start` on may begin a mark that is spelled out, or its end."""
        longest = max(map(len, self._beginnings), default=0)
        places = range(max(start, len(text) - longest), len(text))
        return next((place for place in places if text[place:] in self._beginnings), len(text))

    def _decode(self, token_ids: Sequence[int], begin: int, end: int) -> str:
        """Decode ids. SentencePiece drops the space that begins a text, so the mark before goes along."""
        mark = self._by_id[token_ids[begin - 1]] if begin else ""
        text = self._tokenizer.decode(token_ids[begin - bool(mark) : end], skip_special_tokens=False)
        if text.startswith(mark):
            return text[len(mark) :]
        return self._tokenizer.decode(token_ids[begin:end], skip_special_tokens=False)


def token_id(tokenizer: Decoder, token: str) -> int | None:
    """Return the id of a token of the vocabulary, or None if it has no such token."""
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        return None  # tokenizers answer with the unknown token's id
    return number


def text_of(pieces: Iterable[Piece]) -> str:
    """Join the texts of pieces, markup included."""
    return "".join(piece.text for piece in pieces)
