"""Calls as Hermes and Qwen write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.json_text import read_call, skip_blanks
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of
from gym_sdk.schema import FunctionTool

__all__ = ["HermesParser"]


class HermesParser(MarkupParser):
    """Parses `<think>…</think>` and `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

    name = "hermes"
    blocks: ClassVar = {"<tool_call>": "</tool_call>"}

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read one call."""
        if block[-1].mark != "</tool_call>":
            return [Unparsed(text_of(block))]
        text = text_of(block[1:-1]).strip()
        try:
            call, end = read_call(text, 0)
        except ValueError:
            return [Unparsed(text_of(block))]
        if skip_blanks(text, end) != len(text):
            return [Unparsed(text_of(block))]
        return [call]
