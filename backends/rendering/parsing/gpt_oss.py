"""Harmony, the format of gpt-oss: messages on channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from backends.rendering.parsing.json_text import is_json
from backends.rendering.parsing.messages import Addressed, Kind, MessagesParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece
from gym_sdk.schema import FunctionTool

__all__ = ["GptOssParser"]

_CHANNEL = "<|channel|>"


class GptOssParser(MessagesParser):
    """Parses harmony messages: `analysis` is thinking, a message to a function is a call, the rest is text.

    What has an unknown channel stays text with its markup.
    """

    name = "gpt_oss"
    ends = ("<|end|>", "<|call|>", "<|return|>")
    inner = (_CHANNEL, "<|constrain|>")

    def kind_of(self, message: Addressed) -> Kind:
        """Tell by the recipient, else by the channel."""
        if message.recipient is not None:
            return "calls"
        channel = _channel(message.header)
        if channel == "analysis":
            return "thought"
        return "answer" if channel in ("final", "commentary") else "text"

    def read_calls(self, message: Addressed, tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read one call."""
        yield _call(message.recipient or "", message.body, message.closed) or Unparsed(message.text)


def _call(recipient: str, body: str, closed: bool) -> Call | None:
    name, arguments = recipient.removeprefix("functions."), body.strip()
    if not arguments and closed:
        arguments = "{}"
    # Without an end only an object is known to be whole: `12` may be cut from `123`.
    if not name or not is_json(arguments) or not (closed or arguments.startswith("{")):
        return None
    return Call(name, arguments)


def _channel(header: Sequence[Piece]) -> str | None:
    for index, piece in enumerate(header[:-1]):
        if piece.mark == _CHANNEL:
            words = header[index + 1].text.split()
            return words[0] if words else None
    return None
