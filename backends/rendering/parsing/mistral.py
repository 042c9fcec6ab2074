"""Calls as Mistral writes them."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterable, Sequence
from typing import ClassVar

from backends.rendering.parsing.json_text import read_call, read_value, skip_blanks
from backends.rendering.parsing.markup import THINK, MarkupParser
from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of
from gym_sdk.schema import FunctionTool

__all__ = ["MistralParser"]

_ALPHABET = string.ascii_letters + string.digits
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?=\{)")


class MistralParser(MarkupParser):
    """Parses `[TOOL_CALLS][{"name": …, "arguments": {…}}]` and `[TOOL_CALLS]name[ARGS]{…}`.

    Call ids are nine letters or digits, sampled or made: Mistral's templates refuse others.
    """

    name = "mistral"
    thinking: ClassVar = {"[THINK]": "[/THINK]", **THINK}
    blocks: ClassVar = {"[TOOL_CALLS]": None}
    inner = ("[CALL_ID]", "[ARGS]")

    def read_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read a list of calls, or one call, and the text after it."""
        if _is_list(block):
            text = text_of(block[1:])
            return _read_list(block[0].text, text, text.index("[") + 1)
        return _read_named(block) or [Unparsed(text_of(block))]

    def settled_block(self, block: Sequence[Piece], tools: Sequence[FunctionTool]) -> Iterable[Part]:
        """Read the calls that are whole, and text after them."""
        # `name{…}` is a name if more marks follow.
        if not _is_list(block) and not any(piece.mark == "[ARGS]" for piece in block):
            return []
        return [part for part in self.read_block(block, tools) if not isinstance(part, Unparsed)]

    def new_call_id(self) -> str:
        """Make an id as Mistral's templates want it."""
        return "".join(secrets.choice(_ALPHABET) for _ in range(9))


def _is_list(block: Sequence[Piece]) -> bool:
    # A mark may begin with a bracket as well: only a list begins with one in text.
    return len(block) > 1 and block[1].mark is None and block[1].text.lstrip().startswith("[")


def _read_list(opener: str, text: str, index: int) -> Iterable[Part]:
    """Read the calls of a list whose first element begins at `index`; a cut list gives the calls it has."""
    calls: list[Call] = []
    while True:
        try:
            call, end = read_call(text, skip_blanks(text, index), call_ids=_CALL_ID)
        except ValueError:
            break
        calls.append(call)
        index = skip_blanks(text, end)
        if text[index : index + 1] == "]":
            return [*calls, text[index + 1 :]]
        if text[index : index + 1] != ",":
            break
        index += 1
    # What was read stays read: the rest is the piece of markup that does not parse.
    return [*calls, Unparsed(text[index:] if calls else opener + text)]


def _read_named(block: Sequence[Piece]) -> list[Part] | None:
    """Read `name[ARGS]{…}`, `name[CALL_ID]id[ARGS]{…}` or `name{…}`."""
    fields: dict[str, str] = {"name": ""}
    current = "name"
    arguments = ""
    for index, piece in enumerate(block[1:], 1):
        if piece.mark == "[ARGS]":
            arguments = text_of(block[index + 1 :])
            break
        if piece.mark is not None:
            if piece.mark in fields:
                return None
            current = piece.mark
            fields[current] = ""
        else:
            fields[current] += piece.text
    else:
        if len(fields) > 1 or not (match := _NAMED.match(fields["name"])):
            return None
        arguments = fields["name"][match.end() :]
        fields["name"] = match[1]
    start = skip_blanks(arguments, 0)
    try:
        value, end = read_value(arguments, start)
    except ValueError:
        return None
    name = fields["name"].strip()
    if not name or not isinstance(value, dict):
        return None
    call_id = fields.get("[CALL_ID]", "").strip()
    known = call_id if _CALL_ID.fullmatch(call_id) else None
    return [Call(name, arguments[start:end], known), arguments[end:]]
