"""What a tool returned, as the text that the model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from types import GeneratorType
from typing import Any

from pydantic_core import to_json

__all__ = ["Output", "output_of"]

_BATCH = 256  # entries of a large container that are written together
_PIECE = 4_096  # characters, roughly, of a value that is written at once
_MAX_DEPTH = 255  # as in pydantic
_CONTAINERS = (list, tuple, set, frozenset, GeneratorType)


@dataclass(frozen=True, slots=True)
class Output:
    """The text of a tool's result.

    Attributes:
        text: what the model reads.
        cut: whether some of the result is missing from it.
    """

    text: str
    cut: bool = False


def output_of(value: Any, max_chars: int | None = None) -> Output:
    """Write a result as text.

    Text stays as it is, None is empty, everything else is compact JSON (pydantic models, dataclasses,
    dicts, lists, sets, numbers, booleans, dates). Of a text that is too long, the head is kept, and a last
    line tells the model what is missing. Of a large object only that head is written, piece by piece: a
    result of 100 MB costs neither a second of the event loop nor a copy of itself.

    Args:
        value: what a tool returned.
        max_chars: most characters of the text, that last line not counted; None is without limit.

    Raises:
        ValueError: the value has no JSON form (`pydantic_core.PydanticSerializationError`).
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None:
        return Output("")
    if isinstance(value, str):
        return _cut(value, max_chars, len(value))
    if max_chars is None or isinstance(value, bool | float) or not _is_larger(value, max_chars):
        text = _json(value)
        return _cut(text, max_chars, len(text))
    parts: list[str] = []
    size = 0
    for part in _pieces(value):
        parts.append(part)
        size += len(part)
        if size > max_chars:
            return _cut("".join(parts), max_chars, None)
    return Output("".join(parts))


def _cut(text: str, max_chars: int | None, total: int | None) -> Output:
    cut = max_chars is not None and len(text) > max_chars
    head = text[:max_chars] if cut else text
    if not head.isascii():
        # a lone surrogate (undecodable bytes of a file name, say) could not be sent as JSON
        head = head.encode("utf-8", "replace").decode("utf-8")
    if not cut:
        return Output(head)
    of = "" if total is None else f" of {total:,}"
    return Output(f"{head}\n[output cut: only its first {max_chars:,}{of} characters are shown]", cut=True)


def _json(value: Any) -> str:
    return to_json(value, inf_nan_mode="constants").decode("utf-8")


def _is_larger(value: Any, limit: int) -> bool:
    """Whether the JSON of a value is, roughly, longer than so many characters; looks at no more of it."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        limit -= 1
        if isinstance(entry, str | bytes | bytearray):
            limit -= len(entry)
        elif isinstance(entry, int):
            limit -= entry.bit_length() // 4  # at least the number of its digits
        elif isinstance(entry, dict):
            limit -= 3 * len(entry)
            if limit >= 0:
                waiting.extend(entry)
                waiting.extend(entry.values())
        elif isinstance(entry, _CONTAINERS):
            if isinstance(entry, GeneratorType):
                return True  # it has no length before it is used up
            limit -= len(entry)
            if limit >= 0:
                waiting.extend(entry)
        elif hasattr(entry, "__dict__"):  # a model or a dataclass
            waiting.append(vars(entry))
        if limit < 0:
            return True
    return False


def _pieces(value: Any, depth: int = 0) -> Iterator[str]:
    """Write a large value as JSON, in order, in pieces that take little time each."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply, or holds itself")
    if isinstance(value, dict):
        entries = iter(value.items())
        opened = "{"
        while batch := dict(islice(entries, _BATCH)):
            yield opened
            opened = ","
            if not _is_larger(batch, _PIECE):
                yield _json(batch)[1:-1]
                continue
            for position, (key, entry) in enumerate(batch.items()):
                yield ("," if position else "") + _json({key: 0})[1:-2]
                yield from _pieces(entry, depth + 1)
        yield "{}" if opened == "{" else "}"
    elif isinstance(value, _CONTAINERS):
        members = iter(value)
        opened = "["
        while part := list(islice(members, _BATCH)):
            yield opened
            opened = ","
            if not _is_larger(part, _PIECE):
                yield _json(part)[1:-1]
                continue
            for position, entry in enumerate(part):
                if position:
                    yield ","
                yield from _pieces(entry, depth + 1)
        yield "[]" if opened == "[" else "]"
    else:
        yield _json(value)
