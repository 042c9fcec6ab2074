"""Calls as DeepSeek-V3, -R1 and -V3.1 write them."""

# ruff: noqa: RUF001 - DeepSeek spells its tokens with full-width bars

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.json_text import is_json
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Call, Part
from backends.rendering.parsing.pieces import Piece, text_of
from backends.rendering.parsing.sections import read_section
from gym_sdk.schema import FunctionTool

__all__ = ["DeepseekV3Parser"]

_BEGIN = "<｜tool▁call▁begin｜>"
_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_SECTION_END = "<｜tool▁calls▁end｜>"
_FENCED = re.compile(r"\s*(\S+)[ \t]*\n```(?:json)?[ \t]*\n(.*)\n?```\s*", re.DOTALL)


class DeepseekV3Parser(MarkupParser):
    """Parses sections of calls: `function<sep>name` and fenced JSON, or (V3.1) `name<sep>` and JSON."""

    name = "deepseek_v3"
    blocks: ClassVar = {"<｜tool▁calls▁begin｜>": _SECTION_END}
    inner = (_BEGIN, _END, _SEPARATOR)

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read a section of calls."""
        return read_section(block, _SECTION_END, (_BEGIN, _END), _read)

    def settled_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read the calls that are closed."""
        return read_section(block, _SECTION_END, (_BEGIN, _END), _read, partial=True)


def _read(pieces: Sequence[Piece]) -> Call | None:
    marks = [index for index, piece in enumerate(pieces) if piece.mark]
    if len(marks) != 1 or pieces[marks[0]].mark != _SEPARATOR:
        return None
    name, arguments = text_of(pieces[: marks[0]]).strip(), text_of(pieces[marks[0] + 1 :]).strip()
    if fenced := _FENCED.fullmatch(arguments):
        name, arguments = fenced[1], fenced[2].strip()
    if not name or not is_json(arguments or "{}"):
        return None
    return Call(name, arguments or "{}")
