"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gym_sdk.errors import StoreError
from gym_sdk.store.flushing import sync_folder

__all__ = ["publish", "refuse_existing", "replacing"]


def refuse_existing(path: Path) -> None:
    """Make sure that nothing is overwritten.

    Raises:
        StoreError: the file exists.
    """
    if path.exists():
        raise StoreError("exists already; choose another name or remove it", path=path, errno=errno.EEXIST)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, on the disk; if it raises, none does.

    Raises:
        StoreError: it cannot be made or written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        publish(temporary, path)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot be written: {error.strerror}", path=path, errno=error.errno) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, for good."""
    temporary.replace(path)
    sync_folder(path.parent)
