"""Harmony, the format of gpt-oss: messages on channels."""

from __future__ import annotations

import re
from collections.abc import Sequence

from backends.ids import new_id
from backends.rendering.parsing.base import Decoder, ParsedOutput
from backends.rendering.parsing.json_text import is_json
from backends.rendering.parsing.parts import Call, Collector, Unparsed
from backends.rendering.parsing.pieces import Marks, Piece, text_of
from backends.rendering.parsing.thinking import LOOK
from gym_sdk.schema import FunctionTool

__all__ = ["GptOssParser"]

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"\bto=(\S+)")


class GptOssParser:
    """Parses harmony messages: `analysis` is thinking, a message to a function is a call, the rest is text.

    What stands outside a message or has an unknown channel stays text with its markup.

    Args:
        tokenizer: decodes ids.
        stop_token_ids: tokens that end a turn.
    """

    name = "gpt_oss"

    def __init__(self, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._marks = Marks(tokenizer, (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS))

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
            end = _end_of_message(pieces, start)
            _add_message(given, pieces[start:end], stopped and end == len(pieces), output)
            start, given = end, []
        return output.finish()

    def _given(self, prompt: Sequence[int]) -> list[Piece]:
        """Return what the prompt already says of the first message: its role, at times its channel."""
        pieces = self._marks.split(prompt[-LOOK:])
        start = max((index for index, piece in enumerate(pieces) if piece.mark == _START), default=None)
        if start is None or any(piece.mark in _ENDS for piece in pieces[start:]):
            return []
        return pieces[start:]


def _end_of_message(pieces: Sequence[Piece], start: int) -> int:
    """Return where the message that begins at `start` ends, its closing mark included."""
    for index in range(start, len(pieces)):
        if pieces[index].mark in _ENDS:
            return index + 1
        if pieces[index].mark == _START and index > start:
            return index
    return len(pieces)


def _add_message(given: Sequence[Piece], pieces: Sequence[Piece], stopped: bool, output: Collector) -> None:
    """Add the message that `pieces` say, of which the prompt may have given the beginning."""
    whole = [*given, *pieces]
    marks = [piece.mark for piece in whole]
    closed = stopped or marks[-1] in _ENDS
    if _MESSAGE not in marks:
        output.add(text_of(pieces))
        return
    header = whole[: marks.index(_MESSAGE)]
    # What the prompt has already said of the body was not sampled.
    start = max(marks.index(_MESSAGE) + 1, len(given))
    body = text_of(whole[start : -1 if marks[-1] in _ENDS else None])
    channel, recipient = _channel(header), _recipient(header)
    if not _is_assistant(header):
        output.add(text_of(pieces))
    elif recipient is not None:
        output.add(_call(recipient, body, closed) or Unparsed(text_of(pieces)))
    elif channel == "analysis":
        output.add_thought(body, sum(piece.tokens for piece in pieces))
    elif channel in ("final", "commentary"):
        output.end_message()
        output.add(body)
        output.end_message()
    else:
        output.add(text_of(pieces))


def _call(recipient: str, body: str, closed: bool) -> Call | None:
    name, arguments = recipient.removeprefix("functions."), body.strip()
    if not arguments and closed:
        arguments = "{}"
    # Without an end only an object is known to be whole: `12` may be cut from `123`.
    if not name or not is_json(arguments) or not (closed or arguments.startswith("{")):
        return None
    return Call(name, arguments)


def _is_assistant(header: Sequence[Piece]) -> bool:
    if not header or header[0].mark != _START:
        return True  # the prompt is not known, and ended in the role
    return len(header) > 1 and header[1].mark is None and header[1].text.lstrip().startswith("assistant")


def _channel(header: Sequence[Piece]) -> str | None:
    for index, piece in enumerate(header[:-1]):
        if piece.mark == _CHANNEL:
            words = header[index + 1].text.split()
            return words[0] if words else None
    return None


def _recipient(header: Sequence[Piece]) -> str | None:
    for piece in header:
        if piece.mark is None and (match := _RECIPIENT.search(piece.text)):
            return match[1]
    return None
