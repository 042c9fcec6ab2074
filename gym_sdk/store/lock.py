"""One writer for each file: an advisory lock that the kernel releases when its holder dies, however."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from gym_sdk.errors import StoreError

__all__ = ["open_exclusively"]


def open_exclusively(path: Path, *, create: bool = True) -> int:
    """Open a file to append to it and lock it; closing the descriptor unlocks it.

    The lock is `flock`'s: it belongs to the open file, so a second one in the same process is refused too,
    and a forked child that keeps the descriptor keeps the lock.

    Raises:
        StoreError: somebody holds it (the message says who), or the file cannot be opened or locked.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise StoreError(f"cannot be opened: {error.strerror}", path=path, errno=error.errno) from error
        try:
            _lock(descriptor, path)
            if _is_still(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # somebody put another file in its place between opening and locking


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"{_holder(descriptor)} has this store open; a store has one writer at a time. Wait for it, or "
            "give each process a file of its own and merge them (gym-sdk store merge)",
            path=path,
            errno=errno.EWOULDBLOCK,
        ) from error
    except OSError as error:
        raise StoreError(
            f"cannot be locked: {error.strerror}; keep stores on a file system with flock",
            path=path,
            errno=error.errno,
        ) from error


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Say who holds the lock on a file, as far as Linux tells (`/proc/locks`)."""
    inode = os.fstat(descriptor).st_ino
    try:
        fields = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pid = next(int(line[4]) for line in fields if line[1] == "FLOCK" and _inode(line[5]) == inode)
    except (OSError, StopIteration, ValueError, IndexError):
        return "another process"
    if pid == os.getpid():
        return "another Journal in this process"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"process {pid}, or a child that it forked,"
    return f"process {pid} ({command.strip()[:120]})"


def _inode(field: str) -> int:
    """Read `major:minor:inode` of `/proc/locks`."""
    return int(field.rpartition(":")[2])
