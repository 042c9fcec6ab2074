"""JSON objects read so that a member's text stays known: arguments are kept as the policy wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from backends.rendering.parsing.parts import Call, is_sound

__all__ = ["is_json", "json_text", "may_become_object", "read_call", "read_value", "skip_blanks"]

_DECODER = json.JSONDecoder()
_UNDECIDED = 16
"""Errors this near to a text's end may go away with what follows: `1.`, `-Infin`, `\\u00`."""
_BLANKS = re.compile(r"[ \t\n\r]*")


def skip_blanks(text: str, start: int) -> int:
    """Return where JSON's white space from `start` on ends."""
    match = _BLANKS.match(text, start)
    return match.end() if match else start


def read_value(text: str, start: int) -> tuple[Any, int]:
    """Read the JSON value that begins at `start`; return it and where it ends.

    Raises:
        ValueError: there is none, or it nests too deeply.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("the JSON nests too deeply") from error


def read_call(
    text: str,
    start: int,
    keys: Sequence[str] = ("arguments",),
    *,
    required: bool = False,
    call_ids: re.Pattern[str] | None = None,
) -> tuple[Call, int]:
    """Read the object with `"name"` and arguments that begins at `start`; return the call and its end.

    A member that stands twice counts where it stands last, as JSON parsers have it.

    Args:
        text: holds the object.
        start: where its brace stands.
        keys: what the arguments may be called.
        required: whether arguments have to be there.
        call_ids: which `"id"` members to keep as the call's id.

    Raises:
        ValueError: there is no such object.
    """
    members, end = _read_object(text, start)
    name = members["name"][0] if "name" in members else None
    if not isinstance(name, str) or not name or not is_sound(name):
        raise ValueError("the call has no name")
    if required and not any(key in members for key in keys):
        raise ValueError("the call has no arguments")
    value, written = next((members[key] for key in keys if key in members), ({}, "{}"))
    # Arguments are at times written as a string that holds their JSON.
    arguments = value if isinstance(value, str) else written
    if not is_sound(arguments):
        raise ValueError("the arguments are no text")
    call_id = members["id"][0] if call_ids and "id" in members else None
    if call_ids is None or not isinstance(call_id, str) or not call_ids.fullmatch(call_id):
        call_id = None
    return Call(name, arguments, call_id), end


def is_json(text: str) -> bool:
    """Return whether the text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def may_become_object(text: str, start: int) -> bool:
    """Return whether what begins at `start` is the beginning of a JSON object, as far as can be told."""
    if text[start : start + 1] != "{":
        return False
    try:
        _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or len(text) - error.pos <= _UNDECIDED
    except (ValueError, RecursionError):  # numbers of too many digits, values too deeply nested
        return True
    return False


def json_text(value: Any) -> str:
    """Write a value as JSON, readable where the text can travel.

    Raises:
        ValueError: JSON cannot express it.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if is_sound(text) else json.dumps(value, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError("JSON cannot express this value") from error


def _read_object(text: str, start: int) -> tuple[dict[str, tuple[Any, str]], int]:
    """Return an object's members, each as value and text, and where the object ends."""
    members: dict[str, tuple[Any, str]] = {}
    if text[start : start + 1] != "{":
        raise ValueError("no object begins here")
    index = skip_blanks(text, start + 1)
    if text[index : index + 1] == "}":
        return members, index + 1
    while True:
        key, index = read_value(text, index)
        index = skip_blanks(text, index)
        if not isinstance(key, str) or text[index : index + 1] != ":":
            raise ValueError("no member begins here")
        value_start = skip_blanks(text, index + 1)
        value, index = read_value(text, value_start)
        members[key] = value, text[value_start:index]
        index = skip_blanks(text, index)
        closing = text[index : index + 1]
        if closing == "}":
            return members, index + 1
        if closing != ",":
            raise ValueError("the object does not end")
        index = skip_blanks(text, index + 1)
