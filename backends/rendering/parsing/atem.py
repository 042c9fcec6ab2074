"""ATEM, the format of Muse Glimmer: messages to recipients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from backends.rendering.parsing.invocations import Invocations
from backends.rendering.parsing.messages import Addressed, Kind, MessagesParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
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

    def kind_of(self, message: Addressed) -> Kind:
        """Tell by the recipient."""
        if message.recipient == "self":
            return "thought"
        return "answer" if message.recipient in (None, "user") else "calls"

    def read_calls(self, message: Addressed, tools: Sequence[FunctionTool]) -> Iterable[Part]:
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
