"""How the lines of a store lie in its file: as they are, or each in a zstd frame of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from pydantic_core import from_json

__all__ = ["LineFormat", "PlainLines", "Record", "RecordState", "format_of"]

_BEGINS = b'{"id":'
"""What every line that a journal writes begins with; what does not is nothing that it tore."""


class RecordState(Enum):
    """What the file says about a record, before anybody reads its JSON."""

    WHOLE = "whole"
    UNENDED = "unended"
    """The last line, whole but for the newline. It may have been acknowledged."""
    TORN = "torn"
    """The beginning of a line at the end of the file: the writer was killed. It was never acknowledged."""
    DAMAGED = "damaged"


class Record(NamedTuple):
    """One line of a store and where it lies.

    Attributes:
        number: 1-based number of the line, blank ones included.
        offset: where it begins in the file, in bytes.
        length: its bytes in the file.
        line: its JSON; of a record that is not whole, the bytes as they are in the file.
        state: what the file says about it.
        problem: what is wrong with a damaged one.
    """

    number: int
    offset: int
    length: int
    line: bytes
    state: RecordState = RecordState.WHOLE
    problem: str = ""


class LineFormat(Protocol):
    """Writes lines into a file and finds them again."""

    def encode(self, line: bytes) -> bytes:
        """Return the bytes that a line without its newline has in the file."""

    def decode(self, data: bytes) -> bytes:
        """Return the line of these bytes.

        Raises:
            ValueError: the bytes are damaged.
        """

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """Find the records of a file that is read from its beginning to what is its end now."""


class PlainLines:
    """JSONL."""

    def encode(self, line: bytes) -> bytes:
        """Return the line with its newline."""
        return line + b"\n"

    def decode(self, data: bytes) -> bytes:
        """Return the line; JSON minds no newline at its end."""
        return data

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """Find the lines; memory holds one at a time."""
        end = file.seek(0, os.SEEK_END)
        offset = file.seek(0)
        number = 0
        while offset < end:
            number += 1
            data = file.readline(end - offset)
            if not data.isspace():
                state, problem = (RecordState.WHOLE, "") if data.endswith(b"\n") else _tail(data)
                yield Record(number, offset, len(data), data, state, problem)
            offset += len(data)


def _tail(data: bytes) -> tuple[RecordState, str]:
    """Judge a last line without newline: whole, the beginning of a line, or something else."""
    try:
        whole = from_json(data)
    except ValueError as error:
        problem = str(error)
    else:
        return RecordState.UNENDED if isinstance(whole, dict) else RecordState.DAMAGED, "not an object"
    if _BEGINS.startswith(data[: len(_BEGINS)]) and "trailing characters" not in problem:
        try:
            from_json(data, allow_partial=True)
        except ValueError:
            pass
        else:
            return RecordState.TORN, ""
    return RecordState.DAMAGED, f"neither a line nor the beginning of one: {problem}"


def format_of(path: str | Path) -> LineFormat:
    """Return the format that a file's name stands for: zstd if it ends in `.zst`, JSONL otherwise.

    Raises:
        ConfigurationError: the extra `store` is not installed, which zstd needs.
    """
    if Path(path).suffix != ".zst":
        return PlainLines()
    from gym_sdk.store.zstd_frames import ZstdFrames

    return ZstdFrames()
