"""Calls as Llama 3.2, Llama 4 and LFM2 write them: in Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.base import Decoder
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of, token_id
from backends.rendering.parsing.python_text import read_python_calls
from gym_sdk.schema import FunctionTool

__all__ = ["PythonicParser"]

_ATTEMPT = re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\(")
_BEGINNING = re.compile(r"\s*(?:\[\s*(?:[A-Za-z_][\w.]*)?)?")
"""What may become an attempt."""


class PythonicParser(MarkupParser):
    """Parses `[f(a=1), g(b="x")]`: between the marks of LFM2 or Llama 4, or as the whole text.

    Where the tokenizer has `<|tool_call_start|>`, only what stands between the marks is a call.
    """

    name = "pythonic"
    blocks: ClassVar = {"<|tool_call_start|>": "<|tool_call_end|>", "<|python_start|>": "<|python_end|>"}

    def __init__(self, tokenizer: Decoder, stop_token_ids: frozenset[int]) -> None:
        super().__init__(tokenizer, stop_token_ids)
        self._reads_text = token_id(tokenizer, "<|tool_call_start|>") is None

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read the calls between two marks."""
        if block[-1].mark != self.blocks[block[0].text]:
            return [Unparsed(text_of(block))]
        try:
            return read_python_calls(text_of(block[1:-1]))
        except ValueError:
            return [Unparsed(text_of(block))]

    def read_text(self, text: str) -> Iterable[Part]:
        """Read text that is one list of calls."""
        if not self._reads_text or not _ATTEMPT.match(text):
            return [text]
        try:
            return read_python_calls(text)
        except ValueError:
            return [Unparsed(text)]

    def settled_text(self, text: str) -> Iterable[Part]:
        """Hold back what may become a list of calls: it is one only as a whole."""
        return [] if self._reads_text and (_ATTEMPT.match(text) or _BEGINNING.fullmatch(text)) else [text]
