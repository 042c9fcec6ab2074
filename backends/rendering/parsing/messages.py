"""The parser that formats of addressed messages share: Harmony's and Muse Glimmer's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from backends.ids import new_id
from backends.rendering.parsing.base import Decoder, ParsedOutput
from backends.rendering.parsing.parts import Collector
from backends.rendering.parsing.pieces import Marks, Piece, text_of
from backends.rendering.parsing.thinking import LOOK
from gym_sdk.schema import FunctionTool

__all__ = ["Addressed", "MessagesParser"]

_START, _MESSAGE = "<|start|>", "<|message|>"
_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True, slots=True)
class Addressed:
    """One of the policy's messages.

    Attributes:
        header: what stands before its body; the prompt may have given it.
        body: what was sampled of its body.
        pieces: what was sampled of it, markup included.
        closed: whether it ended.
    """

    header: Sequence[Piece]
    body: str
    pieces: Sequence[Piece]
    closed: bool

    @property
    def recipient(self) -> str | None:
        """Whom the header says that the message is for."""
        for piece in self.header:
            if piece.mark is None and (match := _RECIPIENT.search(piece.text)):
                return match[1]
        return None

    @property
    def text(self) -> str:
        """What was sampled of it, markup included."""
        return text_of(self.pieces)

    @property
    def tokens(self) -> int:
        """How many tokens were sampled of it."""
        return sum(piece.tokens for piece in self.pieces)


class MessagesParser:
    """Cuts a generation into messages, `<|start|>header<|message|>body`; a format says what each of them is.

    What stands outside a message, or in one that is not the assistant's, stays text with its markup.

    Args:
        tokenizer: decodes ids.
        stop_token_ids: tokens that end a turn.
    """

    name: ClassVar[str]
    ends: ClassVar[tuple[str, ...]] = ()
    """Marks that end a message."""
    inner: ClassVar[tuple[str, ...]] = ()
    """Marks that have a meaning within headers."""

    def __init__(self, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> None:
        self._stop_token_ids = stop_token_ids
        self._marks = Marks(tokenizer, (_START, _MESSAGE, *self.inner, *self.ends))

    def parse(
        self, generation: Sequence[int], *, prompt: Sequence[int] = (), tools: Sequence[FunctionTool] = ()
    ) -> ParsedOutput:
        """Parse one generation; see `Parser.parse`."""
        end = len(generation)
        stopped = end > 0 and generation[end - 1] in self._stop_token_ids
        pieces = self._marks.split(generation[: end - stopped])
        output = Collector(lambda text: (text,), lambda: new_id("call"))
        given = self._given(prompt)
        start = 0
        while start < len(pieces):
            end = self._end_of_message(pieces, start)
            message = self._message(given, pieces[start:end], stopped and end == len(pieces))
            if message is None:
                output.add(text_of(pieces[start:end]))
            else:
                self.add_message(message, tools, output)
            start, given = end, []
        return output.finish()

    def add_message(self, message: Addressed, tools: Sequence[FunctionTool], output: Collector) -> None:
        """Add what a message of the assistant's says."""
        output.add(message.text)

    def _given(self, prompt: Sequence[int]) -> list[Piece]:
        """Return what the prompt already says of the first message: its role, at times its header's rest."""
        pieces = self._marks.split(prompt[-LOOK:])
        start = max((index for index, piece in enumerate(pieces) if piece.mark == _START), default=None)
        if start is None or any(piece.mark in self.ends for piece in pieces[start:]):
            return []
        return pieces[start:]

    def _end_of_message(self, pieces: Sequence[Piece], start: int) -> int:
        """Return where the message that begins at `start` ends, its closing mark included."""
        for index in range(start, len(pieces)):
            if pieces[index].mark in self.ends:
                return index + 1
            if pieces[index].mark == _START and index > start:
                return index
        return len(pieces)

    def _message(self, given: Sequence[Piece], pieces: Sequence[Piece], stopped: bool) -> Addressed | None:
        """Return the message that `pieces` say, of which the prompt may have given the beginning."""
        whole = [*given, *pieces]
        marks = [piece.mark for piece in whole]
        if _MESSAGE not in marks:
            return None
        at = marks.index(_MESSAGE)
        if not _is_assistant(whole[:at]):
            return None
        ended = marks[-1] in self.ends
        # What the prompt has already said of the body was not sampled.
        body = text_of(whole[max(at + 1, len(given)) : -1 if ended else None])
        return Addressed(whole[:at], body, pieces, stopped or ended)


def _is_assistant(header: Sequence[Piece]) -> bool:
    if not header or header[0].mark != _START:
        return True  # the prompt is not known, and ended in the role
    return len(header) > 1 and header[1].mark is None and header[1].text.lstrip().startswith("assistant")
