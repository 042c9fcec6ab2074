"""Calls as Kimi K2 writes them."""

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

__all__ = ["KimiK2Parser"]

_BEGIN = "<|tool_call_begin|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"
_END = "<|tool_call_end|>"
_SECTION_END = "<|tool_calls_section_end|>"
_CALL_ID = re.compile(r"(?:functions\.)?(\S+?):\d+")


class KimiK2Parser(MarkupParser):
    """Parses a section of calls, each an id such as `functions.add:0` and JSON arguments.

    The id that was sampled is the call's id: the template writes it again beside the call's output.
    """

    name = "kimi_k2"
    blocks: ClassVar = {"<|tool_calls_section_begin|>": _SECTION_END}
    inner = (_BEGIN, _ARGUMENTS, _END)

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read a section of calls."""
        return read_section(block, _SECTION_END, (_BEGIN, _END), _read)

    def settled_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read the calls that are closed."""
        return read_section(block, _SECTION_END, (_BEGIN, _END), _read, partial=True)


def _read(pieces: Sequence[Piece]) -> Call | None:
    marks = [index for index, piece in enumerate(pieces) if piece.mark]
    if len(marks) != 1 or pieces[marks[0]].mark != _ARGUMENTS:
        return None
    call_id, arguments = text_of(pieces[: marks[0]]).strip(), text_of(pieces[marks[0] + 1 :]).strip()
    match = _CALL_ID.fullmatch(call_id)
    name = match[1] if match else call_id.removeprefix("functions.")
    if not name or not is_json(arguments or "{}"):
        return None
    return Call(name, arguments or "{}", call_id if match else None)
