"""The parser that all formats with thinking marks and call marks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from backends.ids import new_id
from backends.rendering.parsing.base import Decoder, ParsedOutput
from backends.rendering.parsing.parts import Collector, Part, Unparsed
from backends.rendering.parsing.pieces import Marks, Piece, text_of
from backends.rendering.parsing.thinking import ThinkingLook
from gym_sdk.schema import FunctionTool

__all__ = ["THINK", "MarkupParser"]

THINK: Mapping[str, str] = {"<think>": "</think>"}


class MarkupParser:
    """Walks through the pieces of a generation; a format says which marks there are and reads its calls.

    Args:
        tokenizer: decodes ids.
        stop_token_ids: tokens that end a turn; they are not part of its text.
    """

    name: ClassVar[str]
    thinking: ClassVar[Mapping[str, str]] = THINK
    """Marks that open thinking, and what closes each."""
    blocks: ClassVar[Mapping[str, str | None]] = {}
    """Marks that open a call or a section of calls, and what closes each; None: the next one or the end."""
    inner: ClassVar[tuple[str, ...]] = ()
    """Marks that have a meaning within blocks."""

    def __init__(self, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        closers = [closer for closer in self.blocks.values() if closer is not None]
        marks = [*self.thinking, *self.thinking.values(), *self.blocks, *closers, *self.inner]
        self._marks = Marks(tokenizer, dict.fromkeys(marks))
        self._look = ThinkingLook(tokenizer, self.thinking, stop_token_ids)
        self._openers = {closer: opener for opener, closer in self.thinking.items()}
        self._borders = frozenset([*self.thinking, *self._openers, *self.blocks])

    def parse(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Parse one generation; see `Parser.parse`."""
        end = len(generation)
        if end and generation[end - 1] in self._stop_token_ids:
            end -= 1
        pieces = self._marks.split(generation[:end], partial=partial)
        if prompt:
            opened = self._look.opened_by(prompt)
        else:
            # Thinking that is closed before anything else opens was opened by the prompt.
            border = next((piece.mark for piece in pieces if piece.mark in self._borders), None)
            if border is None and partial:
                return ParsedOutput()
            opened = None if border is None else self._openers.get(border)
        output = Collector(self.read_text, self.new_call_id)
        index = 0
        if opened is not None and pieces:
            index = self._add_thought(pieces, 0, opened, output, partial=partial)
        while index < len(pieces):
            piece = pieces[index]
            if piece.mark is not None and piece.mark in self.thinking:
                index = self._add_thought(
                    pieces, index + 1, piece.mark, output, opening=piece.tokens, partial=partial
                )
            elif piece.mark in self.blocks:
                end, closed = self._end_of_block(pieces, index)
                read = self.settled_block if partial and not closed else self.read_block
                for part in read(pieces[index:end], tools):
                    output.add(part)
                index = end
            else:
                output.add(piece.text)
                index += 1
        return output.settle(self.settled_text) if partial else output.finish()

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read what stands from an opening mark to its closing mark, or to the end if it is not closed."""
        yield Unparsed(text_of(block))

    def read_text(self, text: str) -> Iterable[Part]:
        """Read text that stands outside thinking and blocks."""
        yield text

    def read_thought(self, text: str, *, opened: bool) -> str:
        """Return thinking without what the format writes around it.

        Args:
            text: what stands between the marks.
            opened: whether its opening mark was sampled.
        """
        return text

    def settled_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read what is certain of a block that goes on; see `read_block`."""
        return ()

    def settled_text(self, text: str) -> Iterable[Part]:
        """Read what is certain of text that goes on; see `read_text`."""
        yield text

    def settled_thought(self, text: str, *, opened: bool) -> str:
        """Return with what thinking that goes on is certain to begin; see `read_thought`."""
        return text

    def new_call_id(self) -> str:
        """Make an id for a call that was sampled without one."""
        return new_id("call")

    def _add_thought(
        self,
        pieces: Sequence[Piece],
        start: int,
        opener: str,
        output: Collector,
        *,
        opening: int = 0,
        partial: bool,
    ) -> int:
        """Add the thinking whose text begins at `start`; return where it ends, its closing mark included."""
        closer = self.thinking[opener]
        end = start
        while end < len(pieces) and pieces[end].mark != closer:
            end += 1
        tokens = opening + sum(piece.tokens for piece in pieces[start : end + 1])
        goes_on = partial and end == len(pieces)
        read = self.settled_thought if goes_on else self.read_thought
        output.add_thought(read(text_of(pieces[start:end]), opened=opening > 0), tokens, goes_on=goes_on)
        return min(end + 1, len(pieces))

    def _end_of_block(self, pieces: Sequence[Piece], start: int) -> tuple[int, bool]:
        """Return where the block that begins at `start` ends, and whether it is over."""
        closer = self.blocks[pieces[start].text]
        for index in range(start + 1, len(pieces)):
            mark = pieces[index].mark
            if closer is None and (mark in self.blocks or mark in self.thinking):
                return index, True
            if closer is not None and mark == closer:
                return index + 1, True
        return len(pieces), False
