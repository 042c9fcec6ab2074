"""Calls as Qwen3-Coder, Qwen3.5 and Nemotron write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of
from backends.rendering.parsing.typed import typed_arguments
from gym_sdk.schema import FunctionTool

__all__ = ["Qwen3CoderParser"]

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>\s*")
# A value may itself hold `</parameter>`: it ends where a parameter or the function's end follows.
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|</function>)", re.DOTALL
)
_END = re.compile(r"</function>\s*")


class Qwen3CoderParser(MarkupParser):
    """Parses `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`."""

    name = "qwen3_coder"
    blocks: ClassVar = {"<tool_call>": "</tool_call>"}

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read one call."""
        call = _read(text_of(block[1:-1]), tools) if block[-1].mark == "</tool_call>" else None
        return [Unparsed(text_of(block)) if call is None else call]


def _read(text: str, tools: Sequence[FunctionTool]) -> Call | None:
    function = _FUNCTION.match(text)
    if function is None:
        return None
    index = function.end()
    written: list[tuple[str, str]] = []
    while parameter := _PARAMETER.match(text, index):
        written.append((parameter[1], parameter[2]))
        index = parameter.end()
    if not _END.fullmatch(text, index):
        return None
    return Call(function[1], typed_arguments(function[1], written, tools))
