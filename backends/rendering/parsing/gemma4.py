"""Calls and thinking as Gemma 4 writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.base import Decoder
from backends.rendering.parsing.gemma4_text import QUOTE, read_arguments
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of, token_id
from gym_sdk.schema import FunctionTool

__all__ = ["Gemma4Parser"]

_END = "<tool_call|>"
_CHANNEL_NAME = "thought\n"
_STOPS = ("<turn|>", "<|tool_response>")
_HEAD = re.compile(r"\s*call:\s*([^\s{]+)\s*(?=\{)")


class Gemma4Parser(MarkupParser):
    """Parses `<|channel>thought…<channel|>` and `<|tool_call>call:f{a:1,b:<|"|>text<|"|>}<tool_call|>`.

    All that stands in a channel is thinking, as the templates have it. A turn ends with `<turn|>`, one that
    calls with `<|tool_response>`, whatever else stops generations.
    """

    name = "gemma4"
    thinking: ClassVar = {"<|channel>": "<channel|>"}
    blocks: ClassVar = {"<|tool_call>": _END}
    inner = (QUOTE,)

    def __init__(self, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> None:
        stops = {number for stop in _STOPS if (number := token_id(tokenizer, stop)) is not None}
        super().__init__(tokenizer, stop_token_ids | stops)

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read one call."""
        head = _HEAD.match(block[1].text) if block[-1].mark == _END else None
        if head is None:
            return [Unparsed(text_of(block))]
        rest = Piece(block[1].text[head.end() :], 0)
        try:
            return [Call(head[1], read_arguments([rest, *block[2:-1]]))]
        except ValueError:
            return [Unparsed(text_of(block))]

    def read_thought(self, text: str, *, opened: bool) -> str:
        """Take off the channel's name, unless the prompt wrote it, and the line's end before the mark."""
        return (text.removeprefix(_CHANNEL_NAME) if opened else text).removesuffix("\n")

    def settled_thought(self, text: str, *, opened: bool) -> str:
        """Return thinking without what may be the channel's name or the line's end before the mark."""
        if opened and _CHANNEL_NAME.startswith(text):
            return ""
        return self.read_thought(text, opened=opened)
