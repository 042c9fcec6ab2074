"""Lines in zstd: a frame for each, so that appending and cutting work and `zstd -d` reads the file.

A frame's length is found by walking its blocks, without decompressing (RFC 8878, section 3.1.1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

from gym_sdk.store.formats import Record, RecordState
from gym_sdk.store.needs import needs_store_extra

with needs_store_extra():
    from backports import zstd

__all__ = ["ZstdFrames"]

_MAGIC = b"\x28\xb5\x2f\xfd"
_LEVEL = 1  # token ids in text pack as well as at 3, in a third of the time
_LARGEST_HEADER = 18
_LARGEST_BLOCK = 128 * 1024
_LARGEST_FRAME = 2**30  # a line of more is not ours: somebody compressed a whole file
_CHUNK = 2**20
_RLE, _RESERVED = 1, 3


class _IncompleteError(ValueError):
    """The file ends before the frame does."""


class ZstdFrames:
    """JSONL of which each line is a zstd frame with a checksum."""

    def __init__(self) -> None:
        self._compressor = zstd.ZstdCompressor(
            options={
                zstd.CompressionParameter.compression_level: _LEVEL,
                zstd.CompressionParameter.checksum_flag: True,
            }
        )

    def encode(self, line: bytes) -> bytes:
        """Return a frame that holds the line and its newline."""
        return self._compressor.compress(line + b"\n", zstd.ZstdCompressor.FLUSH_FRAME)

    def decode(self, data: bytes) -> bytes:
        """Return the line of a frame.

        Raises:
            ValueError: the frame is damaged, or holds several lines.
        """
        try:
            line = zstd.decompress(data)
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from error
        if b"\n" in line[:-1]:
            raise ValueError("several lines in one zstd frame; unpack the file (`zstd -d`) and use that")
        return line

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """Find the frames; memory holds one at a time, and its line."""
        end = file.seek(0, os.SEEK_END)
        offset = number = 0
        while offset < end:
            number += 1
            record = self._record(file, number, offset, end)
            yield record
            offset += record.length

    def _record(self, file: BinaryIO, number: int, offset: int, end: int) -> Record:
        state = RecordState.DAMAGED
        try:
            data = _read(file, offset, _frame_length(file, offset, end))
            return Record(number, offset, len(data), self.decode(data))
        except _IncompleteError as error:
            state, problem = RecordState.TORN, str(error)
        except ValueError as error:
            problem = str(error)
        after = self._next_frame(file, offset + 1, end)
        if after is not None:  # what was written later is whole: this was no kill
            state = RecordState.DAMAGED
        length = (end if after is None else after) - offset
        return Record(number, offset, length, _read(file, offset, length), state, problem)

    def _next_frame(self, file: BinaryIO, start: int, end: int) -> int | None:
        """Return where the next frame that can be read begins."""
        position = start
        while position < end:
            chunk = _read(file, position, min(_CHUNK + len(_MAGIC) - 1, end - position))
            found = chunk.find(_MAGIC)
            while found >= 0:
                if self._readable(file, position + found, end):
                    return position + found
                found = chunk.find(_MAGIC, found + 1)
            position += _CHUNK
        return None

    def _readable(self, file: BinaryIO, offset: int, end: int) -> bool:
        try:
            self.decode(_read(file, offset, _frame_length(file, offset, end)))
        except ValueError:
            return False
        return True


def _frame_length(file: BinaryIO, offset: int, end: int) -> int:
    """Return the length of the frame that begins here.

    Raises:
        ValueError: there is no frame; `_IncompleteError` if what there is may be the beginning of one.
    """
    position = _header_length(_read(file, offset, min(_LARGEST_HEADER, end - offset)))
    checksum = 4 if _read(file, offset + 4, 1)[0] & 0b100 else 0
    last = False
    while not last:
        header = int.from_bytes(_read(file, offset + position, 3), "little")
        if offset + position + 3 > end:
            raise _IncompleteError("the file ends within a zstd frame")
        last, kind, size = bool(header & 1), header >> 1 & 0b11, header >> 3
        if kind == _RESERVED or size > _LARGEST_BLOCK:
            raise ValueError("the blocks of a zstd frame are damaged")
        position += 3 + (1 if kind == _RLE else size)
        if position > _LARGEST_FRAME:
            raise ValueError(
                "a zstd frame of over 1 GiB; if it is a whole file, unpack it (`zstd -d`) and use that"
            )
    if offset + position + checksum > end:
        raise _IncompleteError("the file ends within a zstd frame")
    return position + checksum


def _header_length(head: bytes) -> int:
    if not head.startswith(_MAGIC[: len(head)]):
        raise ValueError("not a zstd frame")
    if len(head) <= len(_MAGIC):
        raise _IncompleteError("the file ends within the header of a zstd frame")
    descriptor = head[4]
    single_segment = descriptor >> 5 & 1
    window = 1 - single_segment
    dictionary = (0, 1, 2, 4)[descriptor & 0b11]
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    return 5 + window + dictionary + content_size


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)
