"""Putting a file on the disk behind the writer's back, many lines at a time."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from gym_sdk.errors import StoreError

__all__ = ["Flusher", "sync_folder"]

_INTERVAL_S = 0.1


class Flusher:
    """A thread that calls `fdatasync` while there is something new, at most every tenth of a second.

    A write that follows a failure raises: what the kernel could not put on the disk it may have dropped, and
    a second call would report success (fsync(2), "EIO").

    Args:
        descriptor: the open file; stays open until the flusher has stopped.
        path: its name, for messages.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._new = threading.Event()
        self._stopping = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name=f"flush {path.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._new.set()
        self._thread.join()
        if kind is None:
            self.check()

    def wrote(self) -> None:
        """Say that there is something new."""
        self._new.set()

    def check(self) -> None:
        """Raise what went wrong so far.

        Raises:
            StoreError: the disk refused a flush.
        """
        if self._error is not None:
            raise StoreError(
                f"could not be put on the disk: {self._error.strerror}; what was written last may be lost if "
                "the machine stops. Check the disk, then open the store again",
                path=self._path,
                errno=self._error.errno,
            ) from self._error

    def _run(self) -> None:
        while self._error is None:
            self._new.wait()
            self._new.clear()
            stopping = self._stopping.is_set()
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._error = error
            if stopping or (self._stopping.wait(_INTERVAL_S) and not self._new.is_set()):
                return


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, so that a new or renamed file in it is found after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
