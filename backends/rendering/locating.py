"""Which tokens of a generation spell a text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Span", "locate"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"

Span = tuple[int, int]
"""Start and end."""


def locate(pieces: Sequence[bytes], added: Sequence[bool], texts: Sequence[str]) -> list[Span | None]:
    """Find texts in a generation, one after the other.

    Formats put what the policy says between added tokens and write words of their own beside it. So places
    alone between two added tokens, or the ends, go before those after one, and these before any other. Texts
    are looked for from the beginning and from the end: a place counts if both ways lead there.

    Args:
        pieces: the bytes of each token.
        added: whether each token is one of the tokenizer's added tokens.
        texts: in the order of sampling.

    Returns:
        For each text the range of tokens that hold its characters; None if it can't be told.
    """
    spelled = _Spelled.of(pieces)
    borders = _Borders.of(spelled, added)
    first = _places(spelled.text, texts, borders, backwards=False)
    last = _places(spelled.text, texts, borders, backwards=True)
    return [
        spelled.tokens(place) if place is not None and place == other else None
        for place, other in zip(first, last, strict=True)
    ]


class _Spelled(NamedTuple):
    """A generation as text.

    Attributes:
        text: what its bytes spell.
        first: for each character the token that holds its first byte.
        last: for each character the token that holds its last byte.
        before: for each token how many characters begin before it.
    """

    text: str
    first: list[int]
    last: list[int]
    before: list[int]

    @classmethod
    def of(cls, pieces: Sequence[bytes]) -> _Spelled:
        """Join the bytes of tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spelled = cls("", [], [], [])
        texts: list[str] = []
        begun: int | None = None
        for index, piece in enumerate([*pieces, b""]):
            spelled.before.append(len(spelled.first) + (begun is not None))
            text = decoder.decode(piece, final=index == len(pieces))
            if text:
                texts.append(text)
                spelled.first.extend([index] * len(text))
                spelled.last.extend([index] * len(text))
                if begun is not None:
                    spelled.first[-len(text)] = begun
                    # What stays broken has no byte in the token that shows it.
                    spelled.last[-len(text)] -= text[0] == _BROKEN
                begun = None
            if begun is None and decoder.getstate()[0]:
                begun = index
        return spelled._replace(text="".join(texts))

    def tokens(self, place: Span) -> Span:
        """Return the tokens that hold the characters of a place."""
        start, end = place
        return self.first[start], self.last[end - 1] + 1


class _Borders(NamedTuple):
    """The places in a generation's text after and before added tokens, its ends included."""

    after: list[int]
    before: frozenset[int]

    @classmethod
    def of(cls, spelled: _Spelled, added: Sequence[bool]) -> _Borders:
        """Find them."""
        marks = [index for index, is_added in enumerate(added) if is_added]
        after = dict.fromkeys([0, *(spelled.before[index + 1] for index in marks)])
        before = frozenset([len(spelled.text), *(spelled.before[index] for index in marks)])
        return cls(list(after), before)


def _places(spelled: str, texts: Sequence[str], borders: _Borders, *, backwards: bool) -> list[Span | None]:
    """Find the texts from the beginning or from the end; what is not found says nothing on the others."""
    places: list[Span | None] = []
    begin, end = 0, len(spelled)
    for text in reversed(texts) if backwards else texts:
        start = _find(spelled, text, begin, end, borders, backwards=backwards) if text else -1
        if start < 0:
            places.append(None)
            continue
        places.append((start, start + len(text)))
        begin, end = (begin, start) if backwards else (start + len(text), end)
    return places[::-1] if backwards else places


def _find(spelled: str, text: str, begin: int, end: int, borders: _Borders, *, backwards: bool) -> int:
    """Return where the best place for a text starts, the first or the last of them; -1: there is none."""
    after = [
        start
        for start in borders.after
        if begin <= start <= end - len(text) and spelled.startswith(text, start)
    ]
    alone = [start for start in after if start + len(text) in borders.before]
    if best := alone or after:
        return best[-1 if backwards else 0]
    return spelled.rfind(text, begin, end) if backwards else spelled.find(text, begin, end)
