"""Reading a store from one end to the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gym_sdk.errors import StoreError
from gym_sdk.schema import Rollout
from gym_sdk.store.formats import LineFormat, Record, RecordState, format_of
from gym_sdk.store.heads import Head, NewerVersionError, read_head, read_line
from gym_sdk.store.index import Entry, Index

__all__ = ["LastLines", "damaged", "open_to_read", "read_rollouts", "scan"]

_log = logging.getLogger(__name__)


def damaged(path: str | Path, line: int, problem: str) -> StoreError:
    """Return the error for a line that cannot be read; it says how to go on without that line."""
    return StoreError(
        f"{problem}. To go on without the lines that cannot be read, and keep them in a file beside it: "
        f"gym-sdk store repair {path}",
        path=path,
        line=line,
    )


def open_to_read(path: str | Path) -> BinaryIO:
    """Open a store for reading, whoever writes to it.

    Raises:
        StoreError: it cannot be opened.
    """
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise StoreError(f"cannot be read: {error.strerror}", path=path, errno=error.errno) from error


def scan(file: BinaryIO, lines: LineFormat, path: str | Path) -> Iterator[tuple[Record, Head | None]]:
    """Yield each record with its head. Only the last can be torn; then it has none.

    Raises:
        StoreError: a line is damaged; names it.
    """
    for record in lines.records(file):
        if record.state is RecordState.TORN:
            yield record, None
            continue
        if record.state is RecordState.DAMAGED:
            raise damaged(path, record.number, record.problem)
        try:
            head = read_head(record.line)
        except NewerVersionError as error:
            raise StoreError(str(error), path=path, line=record.number) from error
        except ValueError as error:
            raise damaged(path, record.number, str(error)) from error
        yield record, head


class LastLines:
    """A store open for reading: the last line of each key, in order of finishing.

    It shows the file as it was when it was opened; what another process writes meanwhile is not in it. A torn
    last line is left out.

    Args:
        path: the file.
        fingerprints: whether to compute the fingerprints of the tasks.

    Raises:
        StoreError: the file cannot be read, or a line of it is damaged.
    """

    def __init__(self, path: str | Path, *, fingerprints: bool = False) -> None:
        self.path = Path(path)
        self.index = Index()
        self.lines = 0
        """All lines, those that a later one of the same key replaced included."""
        self._format = format_of(path)
        self._file = open_to_read(path)
        try:
            for record, head in scan(self._file, self._format, path):
                if head is None:
                    _log.info("%s: the last line is not whole (yet): left out", path)
                    continue
                self.lines += 1
                fingerprint = head.fingerprint if fingerprints else None
                entry = Entry(record.offset, record.length, head.outcome, fingerprint)
                self.index.add(head.key, entry)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> LastLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def line(self, entry: Entry) -> bytes:
        """Return the JSON of an entry's line, with or without a newline."""
        self._file.seek(entry.offset)
        try:
            return self._format.decode(self._file.read(entry.length))
        except ValueError as error:
            raise self._damaged(entry, error) from error

    def load(self, entry: Entry) -> Rollout:
        """Return an entry's rollout.

        Raises:
            StoreError: the line is JSON but no rollout.
        """
        line = self.line(entry)
        try:
            return read_line(line)
        except ValueError as error:
            raise self._damaged(entry, error) from error

    def rollouts(self) -> Iterator[Rollout]:
        """Yield the last rollout of each key, in order of finishing."""
        for entry in self.entries():
            yield self.load(entry)

    def entries(self) -> Iterator[Entry]:
        """Yield the entries in order of finishing."""
        for key in self.index:
            entry = self.index.get(key)
            if entry is not None:
                yield entry

    def _damaged(self, entry: Entry, error: ValueError) -> StoreError:
        records = self._format.records(self._file)
        line = next((record.number for record in records if record.offset == entry.offset), 0)
        return damaged(self.path, line, str(error))


def read_rollouts(path: str | Path, *, every: bool = False) -> Iterator[Rollout]:
    """Read the rollouts of a store, in the order in which they finished.

    The file may be written to meanwhile; a last line that is not whole is left out.

    Args:
        path: a journal; zstd if its name ends in `.zst`.
        every: also yield the attempts that a later one of the same key replaced.

    Raises:
        StoreError: the file cannot be read, or a line is no rollout; names the file and the line.
        ConfigurationError: the file is zstd and the extra `store` is not installed.
    """
    if every:
        yield from _every(path)
        return
    with LastLines(path) as lines:
        yield from lines.rollouts()


def _every(path: str | Path) -> Iterator[Rollout]:
    lines = format_of(path)
    with open_to_read(path) as file:
        for record in lines.records(file):
            if record.state is RecordState.TORN:
                continue
            if record.state is RecordState.DAMAGED:
                raise damaged(path, record.number, record.problem)
            try:
                yield read_line(record.line)
            except ValueError as error:
                raise damaged(path, record.number, str(error)) from error
