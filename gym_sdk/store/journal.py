"""The journal: an append-only file, one line for each finished rollout, from which a killed run goes on."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic_core import PydanticSerializationError, to_json

from gym_sdk.errors import StoreError
from gym_sdk.schema import Outcome, Rollout, RolloutKey
from gym_sdk.store.flushing import Flusher, sync_folder
from gym_sdk.store.formats import Record, RecordState, format_of
from gym_sdk.store.heads import read_head, read_line
from gym_sdk.store.index import Entry, Index
from gym_sdk.store.lock import open_exclusively
from gym_sdk.store.scanning import scan

__all__ = ["Journal", "to_line"]

_log = logging.getLogger(__name__)


class Journal:
    """Appends rollouts to a file, and knows those that are in it by key. It is a context manager.

    A line belongs to the operating system when `write` returns: a killed process loses nothing of it.
    Entering reads what is there, cuts off a last line that a killed writer left incomplete, and locks the
    file until it is left. A key may be written again (a failed rollout that was attempted again); its last
    line counts.

    It blocks: for tens of microseconds to write a short rollout, for milliseconds to write one of hundreds of
    kilobytes, for two to four seconds per GB to open. Its methods may be called from any thread.

    Args:
        path: the file; it and its folders are made if they do not exist. Zstd if the name ends in `.zst`.
        durable: also put what was written on the disk, within about a tenth of a second and before the
            journal is left, so that it survives the machine's end and not only the process's.

    Raises:
        StoreError: on entering: another process, or another Journal of this one, writes to the file (the
            message says who); a line is damaged (it says which); the file cannot be opened.
        ConfigurationError: the name ends in `.zst` and the extra `store` is not installed.
    """

    def __init__(self, path: str | Path, *, durable: bool = False) -> None:
        self.path = Path(path)
        self._durable = durable
        self._format = format_of(path)
        self._index = Index()
        self._mutex = threading.Lock()
        self._stack = ExitStack()
        self._flusher: Flusher | None = None
        self._descriptor = -1
        self._end = 0  # of the last whole line
        self._torn = False  # there may be something after it

    def __enter__(self) -> Self:
        if self._descriptor >= 0:
            raise StoreError("this journal is open already", path=self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"its folder cannot be made: {error.strerror}", path=self.path, errno=error.errno
            ) from error
        with ExitStack() as stack:
            self._descriptor = open_exclusively(self.path)
            stack.callback(self._close)
            self._read_index()
            if self._durable:
                sync_folder(self.path.parent)
                self._flusher = stack.enter_context(Flusher(self._descriptor, self.path))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def write(self, rollout: Rollout) -> None:
        """Append one rollout.

        Raises:
            StoreError: it could not be written, e.g. because the disk is full. The file is as it was before;
                the rollout may be written again.
        """
        line = to_line(rollout)
        with self._mutex:
            if self._flusher is not None:
                self._flusher.check()
            data = self._format.encode(line)
            offset = self._append(data)
            self._index.add(rollout.key, Entry(offset, len(data), rollout.outcome, None))
        if self._flusher is not None:
            self._flusher.wrote()

    def sync(self) -> None:
        """Put everything that was written on the disk, now. It may take milliseconds.

        Raises:
            StoreError: the disk refuses.
        """
        try:
            os.fdatasync(self._opened())
        except OSError as error:
            raise self._refused(error) from error

    def outcome(self, key: RolloutKey) -> Outcome | None:
        """Return how the rollout with this key ended; None if the journal has none."""
        entry = self._index.get(key)
        return None if entry is None else entry.outcome

    def fingerprint(self, key: RolloutKey) -> str | None:
        """Return the `task_fingerprint` of the task of the rollout with this key; None if there is none."""
        entry = self._index.get(key)
        if entry is None:
            return None
        return entry.fingerprint or read_head(self._line(entry)).fingerprint

    def load(self, key: RolloutKey) -> Rollout:
        """Read the rollout with this key.

        Raises:
            KeyError: the journal has none.
            StoreError: its line cannot be read.
        """
        entry = self._index.get(key)
        if entry is None:
            raise KeyError(key)
        try:
            return read_line(self._line(entry))
        except ValueError as error:
            raise StoreError(f"{key} cannot be read: {error}", path=self.path) from error

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[RolloutKey]:
        return iter(self._index)

    def _opened(self) -> int:
        if self._descriptor < 0:
            raise StoreError("the journal is not open; use `with Journal(path) as journal:`", path=self.path)
        return self._descriptor

    def _close(self) -> None:
        descriptor, self._descriptor, self._flusher = self._descriptor, -1, None
        os.close(descriptor)

    def _line(self, entry: Entry) -> bytes:
        try:
            return self._format.decode(os.pread(self._opened(), entry.length, entry.offset))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"the line at byte {entry.offset} cannot be read: {error}", path=self.path
            ) from error

    def _read_index(self) -> None:
        self._index = Index()
        self._end = 0
        last: Record | None = None
        with self.path.open("rb") as file:  # a description of its own: reading moves its position
            for record, head in scan(file, self._format, self.path):
                last = record
                if head is not None:
                    entry = Entry(record.offset, record.length, head.outcome, head.fingerprint)
                    self._index.add(head.key, entry)
                    self._end = record.offset + record.length
        if last is None:
            self._end = os.fstat(self._descriptor).st_size  # blank lines
        elif last.state is RecordState.UNENDED:
            self._append(b"\n")
        elif last.state is RecordState.TORN:
            self._end = last.offset
            self._cut_back()
            _log.warning(
                "%s: cut off a last line of %d bytes that was not whole; its writer was killed",
                self.path,
                last.length,
            )
        else:
            self._end = os.fstat(self._descriptor).st_size

    def _append(self, data: bytes) -> int:
        """Write these bytes after the last line, all or nothing; return where."""
        descriptor, start = self._opened(), self._end
        try:
            if self._torn:
                self._cut_back()
            left = memoryview(data)
            while left:  # a write may be short
                left = left[os.write(descriptor, left) :]
            self._end = start + len(data)
        except BaseException as error:
            self._end, self._torn = start, True
            try:
                self._cut_back()
            except OSError:
                _log.warning("%s: could not cut off a partial line; the next write tries again", self.path)
            if isinstance(error, OSError):
                raise self._refused(error) from error
            raise
        return start

    def _cut_back(self) -> None:
        os.ftruncate(self._opened(), self._end)
        self._torn = False

    def _refused(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot be written: {error.strerror}. The {len(self)} rollouts in it are safe. Make room or "
            "move it to another disk; the same call with the same store then goes on from there",
            path=self.path,
            errno=error.errno,
        )


def to_line(rollout: Rollout) -> bytes:
    """Return a rollout as a line of JSON, without the newline. What JSON cannot say is written as text."""
    try:
        return to_json(rollout, fallback=str)
    except PydanticSerializationError:  # text that is no Unicode, e.g. a file name in an error's message
        return to_json(_encodable(rollout.model_dump()), fallback=str)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(entry) for entry in value]
    return value
