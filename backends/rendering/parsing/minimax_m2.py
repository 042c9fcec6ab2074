"""Calls as MiniMax-M2 writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.invocations import Invocations
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of
from gym_sdk.schema import FunctionTool

__all__ = ["MinimaxM2Parser"]

_END = "</minimax:tool_call>"
_INVOCATIONS = Invocations("", r"\Z")


class MinimaxM2Parser(MarkupParser):
    """Parses sections of `<invoke name="f"><parameter name="a">1</parameter></invoke>`."""

    name = "minimax_m2"
    blocks: ClassVar = {"<minimax:tool_call>": _END}

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read a section of calls; what was read before it breaks stays read."""
        if block[-1].mark != _END:
            return [Unparsed(text_of(block))]
        text = text_of(block[1:-1])
        calls, end, closed = _INVOCATIONS.read(text, 0, tools)
        if closed:
            return calls
        return [*calls, Unparsed(text[end:] + _END if calls else text_of(block))]
