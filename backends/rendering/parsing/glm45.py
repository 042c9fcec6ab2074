"""Calls as GLM-4.5 and its successors write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of
from backends.rendering.parsing.typed import typed_arguments
from gym_sdk.schema import FunctionTool

__all__ = ["Glm45Parser"]


class Glm45Parser(MarkupParser):
    """Parses `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`."""

    name = "glm45"
    blocks: ClassVar = {"<tool_call>": "</tool_call>"}
    inner = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read one call."""
        call = _read(block[1:-1], tools) if block[-1].mark == "</tool_call>" else None
        return [Unparsed(text_of(block)) if call is None else call]


def _read(pieces: Sequence[Piece], tools: Sequence[FunctionTool]) -> Call | None:
    name = pieces[0].text.strip() if pieces and pieces[0].mark is None else ""
    if not name:
        return None
    index = 1
    written: list[tuple[str, str]] = []
    while index < len(pieces):
        key, index = _between(pieces, index, "<arg_key>", "</arg_key>")
        value, index = _between(pieces, _after_blank(pieces, index), "<arg_value>", "</arg_value>")
        if key is None or value is None:
            return None
        written.append((key.strip(), value))
        index = _after_blank(pieces, index)
    return Call(name, typed_arguments(name, written, tools))


def _after_blank(pieces: Sequence[Piece], index: int) -> int:
    blank = index < len(pieces) and pieces[index].mark is None and not pieces[index].text.strip()
    return index + blank


def _between(pieces: Sequence[Piece], start: int, opener: str, closer: str) -> tuple[str | None, int]:
    """Return the text between two marks, if the first stands at `start`, and where it ends."""
    if start >= len(pieces) or pieces[start].mark != opener:
        return None, start
    for index in range(start + 1, len(pieces)):
        if pieces[index].mark == closer:
            return text_of(pieces[start + 1 : index]), index + 1
    return None, start
