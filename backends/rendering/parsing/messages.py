"""The parser that formats of addressed messages share: Harmony's and Muse Glimmer's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from backends.ids import new_id
from backends.rendering.parsing.base import Decoder, ParsedOutput
from backends.rendering.parsing.parts import Collector, Part, Unparsed
from backends.rendering.parsing.pieces import Marks, Piece, text_of
from backends.rendering.parsing.thinking import LOOK
from gym_sdk.schema import FunctionTool

__all__ = ["Addressed", "Kind", "MessagesParser"]

Kind = Literal["thought", "answer", "calls", "text"]
"""What a message is; `text` stays text with its markup."""

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
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Parse one generation; see `Parser.parse`."""
        end = len(generation)
        stopped = end > 0 and generation[end - 1] in self._stop_token_ids
        pieces = self._marks.split(generation[: end - stopped], partial=partial)
        output = Collector(_as_text, lambda: new_id("call"))
        given = self._given(prompt)
        start = 0
        while start < len(pieces):
            end = self._end_of_message(pieces, start)
            message = self._message(given, pieces[start:end], stopped and end == len(pieces))
            if partial and end == len(pieces) and pieces[-1].mark not in self.ends:
                if message is not None:
                    self._add_open(message, output)
            elif message is not None:
                self._add(message, tools, output)
            else:
                output.add(text_of(pieces[start:end]))
            start, given = end, []
        return output.settle(_as_text) if partial else output.finish()

    def kind_of(self, message: Addressed) -> Kind:
        """Return what a message of the assistant's is, which its header tells."""
        return "text"

    def read_calls(self, message: Addressed, tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read a message of calls."""
        yield Unparsed(message.text)

    def _add(self, message: Addressed, tools: Sequence[FunctionTool], output: Collector) -> None:
        """Add what a message of the assistant's says."""
        match self.kind_of(message):
            case "thought":
                output.add_thought(message.body, message.tokens)
            case "answer":
                output.end_message()
                output.add(message.body)
                output.end_message()
            case "calls":
                for part in self.read_calls(message, tools):
                    output.add(part)
            case "text":
                output.add(message.text)

    def _add_open(self, message: Addressed, output: Collector) -> None:
        """Add what is certain of a message that goes on: what its calls are is not."""
        match self.kind_of(message):
            case "thought":
                output.add_thought(message.body, message.tokens, goes_on=True)
            case "answer":
                output.end_message()
                output.add(message.body)
            case "text":
                output.add(message.text)

    def _given(self, prompt: Sequence[int]) -> list[Piece]:
        """Return what the prompt already says of the first message: its role, at times its header's rest."""
        pieces = self._marks.split(self._marks.since(prompt[-LOOK:], _START))
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


def _as_text(text: str) -> Iterable[Part]:
    return (text,)


def _is_assistant(header: Sequence[Piece]) -> bool:
    if not header or header[0].mark != _START:
        return True  # the prompt is not known, and ended in the role
    return len(header) > 1 and header[1].mark is None and header[1].text.lstrip().startswith("assistant")
