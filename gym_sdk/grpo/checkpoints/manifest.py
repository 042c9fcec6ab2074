"""What files a checkpoint consists of, with their sizes and hashes: `trainer/files.json`.

Safetensors and JSON have no checksums; without these, weights whose bits changed would be trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from gym_sdk.errors import CheckpointError

__all__ = ["MANIFEST", "check_files", "write_manifest"]

MANIFEST = "trainer/files.json"
_WAY_OUT = "Copy it again from where it came, or go back to another checkpoint"


class _Entry(TypedDict):
    bytes: int
    sha256: str


_ENTRIES = TypeAdapter(dict[str, _Entry])


def write_manifest(folder: Path) -> None:
    """List the files that are in the folder now."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {
        file.relative_to(folder).as_posix(): _Entry(bytes=file.stat().st_size, sha256=_sha256(file))
        for file in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def check_files(folder: Path, *, contents: bool = True) -> None:
    """Check that the listed files are there; files that are not listed are nobody's business.

    Args:
        folder: the checkpoint.
        contents: whether to compare the hashes, which reads every byte; else the sizes alone.

    Raises:
        CheckpointError: the list or a file of it is missing or damaged; the message names the file.
    """
    try:
        entries = _ENTRIES.validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}. {_WAY_OUT}", path=folder) from error
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise CheckpointError(f"{MANIFEST} is damaged: {reason}. {_WAY_OUT}", path=folder) from error
    for name, entry in entries.items():
        if problem := _problem(folder / name, entry, contents):
            raise CheckpointError(f"{name} {problem}. {_WAY_OUT}", path=folder)


def _problem(file: Path, entry: _Entry, contents: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"is damaged: it has {size} bytes instead of the {entry['bytes']} in {MANIFEST}"
        if contents and _sha256(file) != entry["sha256"]:
            return f"is damaged: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
