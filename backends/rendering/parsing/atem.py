"""ATEM, the format of Muse Glimmer: messages to recipients."""

from __future__ import annotations

import re
from collections.abc import Sequence

from backends.rendering.parsing.invocations import Invocations
from backends.rendering.parsing.messages import Addressed, MessagesParser
from backends.rendering.parsing.parts import Call, Collector, Part, Unparsed
from gym_sdk.schema import FunctionTool

__all__ = ["AtemParser"]

_BEGIN, _END = "<atem:function_calls>", "</atem:function_calls>"
_INVOCATIONS = Invocations("atem:", re.escape(_END))


class AtemParser(MessagesParser):
    """Parses ATEM messages: one to `self` is thinking, one to a function holds calls, the rest is text.

    Sections of calls in messages to the user are text: the recipient decides.
    """

    name = "atem"
    ends = ("<|eom|>", "<|eot|>")

    def add_message(self, message: Addressed, tools: Sequence[FunctionTool], output: Collector) -> None:
        """Add a message by its recipient."""
        if message.recipient == "self":
            output.add_thought(message.body, message.tokens)
        elif message.recipient in (None, "user"):
            output.end_message()
            output.add(message.body)
            output.end_message()
        else:
            for part in _read(message, tools):
                output.add(part)


def _read(message: Addressed, tools: Sequence[FunctionTool]) -> list[Part]:
    """Read the sections of calls in a message, and the text around them."""
    body = message.body
    parts: list[Part] = []
    start = 0
    while (begin := body.find(_BEGIN, start)) >= 0:
        calls, end, closed = _INVOCATIONS.read(body, begin + len(_BEGIN), tools)
        parts += [body[start:begin], *calls]
        start = end if calls else begin
        if not closed:
            # What follows is not searched again, so that the cost stays linear.
            parts.append(Unparsed(body[start:]))
            start = len(body)
    if not any(isinstance(part, Call) for part in parts):
        return [Unparsed(message.text)]
    return [*parts, body[start:]]
