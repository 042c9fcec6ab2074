"""Rendered text to token ids: special tokens where the template put them, text where somebody wrote it."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from backends.rendering.attribution import Header, Span, owners_of
from backends.rendering.special import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder"]


class _Chunk(NamedTuple):
    """A part of a text that is tokenized by itself; `bare`: with no special tokens."""

    start: int
    text: str
    bare: bool = False


class Encoder:
    """A tokenizer that adds nothing to a text.

    Args:
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.special = SpecialTokens(tokenizer)
        self._tokenizer: Any = tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokenize a text in which every special token counts."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def encode_spans(self, text: str, spans: Sequence[Span]) -> list[int]:
        """Tokenize a rendered text; inside the spans, what looks like a special token is text.

        Args:
            text: the rendered text.
            spans: where the items' texts stand in it.
        """
        ids: list[int] = []
        for chunk in self._chunks(text, spans):
            ids += self._bare.encode(chunk.text).ids if chunk.bare else self.encode(chunk.text)
        return ids

    def owners(
        self, text: str, ids: Sequence[int], spans: Sequence[Span] | None, header: Header
    ) -> list[int]:
        """Return the owning item of each token of a rendered text; -1 where it can't be told.

        Args:
            text: the rendered text.
            ids: its tokens.
            spans: where the items' texts stand in it; None if the template rewrites them.
            header: what opens a user message.
        """
        if spans is None or not self._tokenizer.is_fast:
            return [-1] * len(ids)
        offsets: list[tuple[int, int]] = []
        special: list[tuple[int, int]] = []
        for chunk in self._chunks(text, spans):
            if chunk.bare:
                found = self._bare.encode(chunk.text).offsets
            else:
                options = {"add_special_tokens": False, "return_offsets_mapping": True}
                found = self._tokenizer(chunk.text, **options)["offset_mapping"]
                special += [(chunk.start + a, chunk.start + b) for a, b in self.special.spans(chunk.text)]
            offsets += [(chunk.start + start, chunk.start + end) for start, end in found]
        if len(offsets) != len(ids):
            return [-1] * len(ids)
        return owners_of(spans, special, offsets, header)

    def _chunks(self, text: str, spans: Sequence[Span]) -> Iterator[_Chunk]:
        """Cut a text between special tokens, around each stretch in which an item spells one."""
        spans = sorted(spans, key=lambda span: span.start)
        ends = [span.end for span in spans]
        done = start = position = 0
        lead, spelled = "", False
        while True:
            found = self.special.next(text, position) if spans else None
            begin, end = found or (len(text), len(text))
            at = bisect_left(ends, begin + 1)
            if found and at < len(spans) and spans[at].start < end:
                spelled = True
                position = begin + 1  # its rest may spell another one
                continue
            if spelled:
                if start > done:
                    yield _Chunk(done, text[done:start])
                yield from self._as_text(text, start, begin, lead, text[begin:end])
                done, spelled = begin, False
            if not found:
                break
            # the text between two special tokens is tokenized by itself anyway
            start = position = end
            lead = text[begin:end]
        if done < len(text):
            yield _Chunk(done, text[done:])

    def _as_text(self, text: str, start: int, end: int, lead: str, follower: str) -> Iterator[_Chunk]:
        """Cut a stretch so that no special token is found in it: after the first character of each.

        Tokenizers that begin every piece with a space would add spaces there; for those it stays whole.
        """
        piece = text[start:end]
        if lead in self.special.eat_after:
            piece = piece.lstrip()
        start = end - len(piece)
        if follower in self.special.eat_before:
            piece = piece.rstrip()
        cuts = [0]
        while found := self.special.next(piece, cuts[-1]):
            cuts.append(found[0] + 1)
        parts = [piece[one:other] for one, other in pairwise([*cuts, len(piece)])]
        ids = [token for part in parts for token in self.encode(part)]
        if self.decode(ids) == piece or not self._tokenizer.is_fast:
            yield from (_Chunk(start + cut, part) for cut, part in zip(cuts, parts, strict=True))
        else:
            yield _Chunk(start, piece, bare=True)

    @cached_property
    def _bare(self) -> Any:
        """The tokenizer without its special tokens."""
        from tokenizers import Tokenizer

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["added_tokens"], state["post_processor"] = [], None
        # what stands inside a conversation is not the first of a text
        splitting = json.dumps(state["pre_tokenizer"]).replace('"first"', '"never"')
        state["pre_tokenizer"] = json.loads(splitting)
        return Tokenizer.from_str(json.dumps(state))
