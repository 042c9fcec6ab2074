"""Calls as Llama 3.1 writes them: bare JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.json_text import is_json, may_become_object, read_call, skip_blanks
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of
from backends.rendering.parsing.python_text import read_python_calls
from gym_sdk.schema import FunctionTool

__all__ = ["Llama3JsonParser"]

_KEYS = ("parameters", "arguments")
_ATTEMPT = re.compile(r'\s*\{\s*"name"\s*:')


class Llama3JsonParser(MarkupParser):
    """Parses text that begins with `{"name": …, "parameters": {…}}`, and what follows `<|python_tag|>`.

    Several calls are divided by semicolons or by nothing. After the tag, `name.call(a="x")`, which the
    template teaches for built-in tools, is a call as well.
    """

    name = "llama3_json"
    blocks: ClassVar = {"<|python_tag|>": None}

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read the calls after the tag."""
        text = text_of(block[1:])
        calls, end = _read_calls(text)
        if calls:
            return [*calls, *_rest(text[end:])]
        try:
            built_in = read_python_calls(text)
        except ValueError:
            return [Unparsed(text_of(block))]
        return [Call(call.name.removesuffix(".call"), call.arguments) for call in built_in]

    def read_text(self, text: str) -> Iterable[Part]:
        """Read the calls with which a text begins."""
        calls, end = _read_calls(text)
        return [*calls, *_rest(text[end:])]

    def settled_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read the calls that are whole and what follows; without one the block may become anything."""
        parts = list(self.settled_text(text_of(block[1:])))
        return parts if any(isinstance(part, Call) for part in parts) else []

    def settled_text(self, text: str) -> Iterable[Part]:
        """Read the calls with which a text begins, and what follows unless it may become another one."""
        calls, end = _read_calls(text)
        start = skip_blanks(text, end)
        if calls and text[start : start + 1] == ";":
            start = skip_blanks(text, start + 1)
        undecided = start == len(text) or may_become_object(text, start)
        return calls if undecided else [*calls, text[end:]]


def _read_calls(text: str) -> tuple[list[Call], int]:
    """Return the calls with which a text begins, and where the last one ends."""
    calls: list[Call] = []
    end = 0
    start = skip_blanks(text, 0)
    while text[start : start + 1] == "{":
        try:
            call, end_of_call = read_call(text, start, _KEYS, required=True)
        except ValueError:
            break
        calls.append(call)
        end = end_of_call
        start = skip_blanks(text, end)
        if text[start : start + 1] == ";":
            start = skip_blanks(text, start + 1)
            end = start if text[start : start + 1] in ("", "{") else end
    return calls, end


def _rest(text: str) -> Iterable[Part]:
    # JSON that is complete and no call is an answer; what breaks off was meant as a call.
    if _ATTEMPT.match(text) and not is_json(text):
        return [Unparsed(text)]
    return [text]
