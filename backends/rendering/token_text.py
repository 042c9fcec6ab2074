"""What single tokens spell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from backends.rendering.locating import Span, locate
from backends.rendering.parsing import Decoder

__all__ = ["TokenText"]

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_PIECES = frozenset({"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})
"""The steps of decoders that write a token's own name, apart from bytes and spaces."""

_Speller = Callable[[int, str], bytes]
"""Turns a token's id and name into its bytes."""


class TokenText:
    """Tells the bytes of each token, and finds the tokens that spell a text.

    A token may hold a part of a character. Its bytes are read from its name in the vocabulary, in the way of
    the tokenizer's decoder. Joined, the bytes of ids are their text; only the space that SentencePiece drops
    where a text begins is still there. If a tokenizer shows no such decoder, its tokens are decoded one by
    one, and parts of characters are lost.

    Args:
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._spell = _speller(tokenizer)
        self._bytes: dict[int, bytes] = {}
        self._added = frozenset(getattr(tokenizer, "added_tokens_decoder", ()))

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token; none if the tokenizer has no such token."""
        known = self._bytes.get(token_id)
        if known is None:
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            known = self._bytes[token_id] = b"" if name is None else self._spell(token_id, name)
        return known

    def text_of(self, token_id: int) -> str:
        """Return the text of a token; what is no whole character shows as U+FFFD."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def locate(self, generation: Sequence[int], texts: Sequence[str]) -> list[Span | None]:
        """Find the tokens of a generation that spell each of the texts.

        Args:
            generation: the sampled ids.
            texts: what was read in it, in the order of sampling.

        Returns:
            For each text the range of its tokens, with those that hold something beside it; None if the
            generation does not spell it or if it can't be told where.
        """
        pieces = [self.bytes_of(token) for token in generation]
        return locate(pieces, [token in self._added for token in generation], texts)


def _speller(tokenizer: Any) -> _Speller:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    steps = [] if decoder is None else list(_steps(json.loads(decoder.__getstate__())))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _spell_bytes
    if steps and kinds <= _PIECES:
        return _spell_pieces(steps)
    return lambda token_id, name: tokenizer.decode([token_id]).encode()


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder, those within sequences included."""
    if decoder["type"] != "Sequence":
        yield decoder
    for step in decoder.get("decoders", ()):
        yield from _steps(step)


def _spell_bytes(token_id: int, name: str) -> bytes:
    """Read a name of byte-level BPE, in which each character stands for a byte."""
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in name):
        return bytes(alphabet[character] for character in name)
    # Added tokens may hold other characters, which then all stand for themselves.
    return name.encode()


@cache
def _byte_alphabet() -> Mapping[str, int]:
    """Return the byte for which each character stands: the printable ones for themselves, then the rest."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def _spell_pieces(steps: Sequence[Mapping[str, Any]]) -> _Speller:
    """Return what reads names of SentencePiece: text with marks for spaces, or a byte."""
    replaced: list[tuple[str, str]] = []
    has_bytes = False
    for step in steps:
        if step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        has_bytes |= step["type"] == "ByteFallback"

    def spell(token_id: int, name: str) -> bytes:
        byte = _BYTE.fullmatch(name) if has_bytes else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            name = name.replace(old, new)
        return name.encode()

    return spell
