"""Arguments in Gemma 4's writing, as JSON text: bare keys, and strings between marks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from backends.rendering.parsing.json_text import is_json, json_text
from backends.rendering.parsing.pieces import Piece, text_of

__all__ = ["QUOTE", "read_arguments"]

QUOTE = '<|"|>'
"""Stands before and after a string."""

_DEPTH = 100
"""How deeply values may nest."""

_WORD = re.compile(r'(?P<string>"(?:[^"\\]|\\.)*")|[{}\[\]:,]|(?P<bare>[^{}\[\]:,"]+)', re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_NAMES = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
"""Words that are values. The templates write Python's `None`; policies may write its other names too."""


class _Word(NamedTuple):
    """What arguments are made of: a `string` in JSON's writing, `bare` text, or a bracket, colon or comma."""

    kind: str
    text: str


def read_arguments(pieces: Sequence[Piece]) -> str:
    """Read `{a:1,b:<|"|>text<|"|>,c:{d:[true]}}`; return JSON text.

    Strings are what stands between two marks, or in JSON's own quotes. Numbers and keys that stand twice stay
    as they were sampled. Keys may be bare or strings; white space between words has no meaning.

    Raises:
        ValueError: this is something else, or nests too deeply.
    """
    reader = _Reader(list(_words(pieces)))
    text = reader.value()
    reader.end()
    return text


def _words(pieces: Sequence[Piece]) -> Iterator[_Word]:
    quotes = [index for index, piece in enumerate(pieces) if piece.mark == QUOTE]
    start = 0
    for opening, closing in zip(quotes[::2], quotes[1::2], strict=False):
        yield from _bare_words(pieces[start:opening])
        yield _Word("string", json_text(text_of(pieces[opening + 1 : closing])))
        start = closing + 1
    # A mark without a partner is found here.
    yield from _bare_words(pieces[start:])


def _bare_words(pieces: Sequence[Piece]) -> Iterator[_Word]:
    for piece in pieces:
        if piece.mark is not None:
            raise ValueError(f"{piece.mark} outside a string")
        end = 0
        for match in _WORD.finditer(piece.text):
            if match.start() != end:
                break
            end = match.end()
            kind = match.lastgroup or match.group()
            if match.group().strip():
                yield _Word(kind, match.group().strip())
        if end != len(piece.text):
            raise ValueError("a string does not end")


class _Reader:
    def __init__(self, words: Sequence[_Word]) -> None:
        self._words = words
        self._index = 0

    def value(self, depth: int = 0) -> str:
        """Read a value; return its JSON text."""
        kind, text = self._next()
        if kind == "bare":
            return _literal(text)
        if kind == "string":
            return _sound(text)
        if kind not in "{[" or depth == _DEPTH:
            raise ValueError("no value begins here, or values nest too deeply")
        closer = "}" if kind == "{" else "]"
        written: list[str] = []
        while not self._take(closer):
            if written:
                self._expect(",")
            key = self._key() if kind == "{" else ""
            written.append(key + self.value(depth + 1))
        return kind + ", ".join(written) + closer

    def end(self) -> None:
        """Check that nothing is left."""
        if self._index != len(self._words):
            raise ValueError("something follows the arguments")

    def _key(self) -> str:
        """Read a key and its colon. An empty key, written bare, is nothing."""
        if self._take(":"):
            return '"": '
        kind, text = self._next()
        if kind not in ("bare", "string"):
            raise ValueError("no key begins here")
        self._expect(":")
        return (_sound(text) if kind == "string" else json_text(text)) + ": "

    def _next(self) -> _Word:
        if self._index == len(self._words):
            raise ValueError("the arguments do not end")
        self._index += 1
        return self._words[self._index - 1]

    def _take(self, kind: str) -> bool:
        found = self._index < len(self._words) and self._words[self._index].kind == kind
        self._index += found
        return found

    def _expect(self, kind: str) -> None:
        if not self._take(kind):
            raise ValueError(f"no {kind!r} where one has to be")


def _literal(text: str) -> str:
    if text in _NAMES:
        return _NAMES[text]
    if not _NUMBER.fullmatch(text):
        raise ValueError("neither a number nor a word that is a value")
    return _sound(text)


def _sound(text: str) -> str:
    """Return text that is JSON; what the policy put in JSON's quotes may not be, nor a very long number."""
    if not is_json(text):
        raise ValueError("not JSON")
    return text
