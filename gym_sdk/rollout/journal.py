"""Rollouts on disk: append-only JSONL, one line for each finished rollout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pydantic import ValidationError
from pydantic_core import to_json

from gym_sdk.errors import DatasetError
from gym_sdk.schema import Rollout

__all__ = ["Journal", "read_rollouts"]


class Journal:
    """Appends rollouts to a file. Each line is handed to the operating system before `write` returns.

    Args:
        path: the file; it and its folders are made if they do not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, rollout: Rollout) -> None:
        """Append one rollout."""
        assert self._file is not None, "the journal is not open"
        line = to_json(rollout, fallback=str) + b"\n"
        while line:  # an unbuffered write may be short
            line = line[self._file.write(line) or 0 :]


def read_rollouts(path: str | Path) -> Iterator[Rollout]:
    """Read the rollouts of a journal, in the order in which they finished.

    Raises:
        DatasetError: a line is not a rollout; names the file and the line.
    """
    try:
        with Path(path).open("rb") as file:
            yield from _parse(file, path)
    except OSError as error:
        raise DatasetError(f"cannot be read: {error}", path=path) from error


def _parse(lines: Iterable[bytes], path: str | Path) -> Iterator[Rollout]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Rollout.model_validate_json(line)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in detail["loc"]) or None
            message = f"not a rollout: {field + ': ' if field else ''}{detail['msg']}"
            raise DatasetError(message, path=path, line=number, field=field) from error
