"""A tracker that appends lines of JSON to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

from gym_sdk.metrics import Table
from gym_sdk.trackers.background import BackgroundTracker, QueueLimits

__all__ = ["JsonlTracker"]


class JsonlTracker(BackgroundTracker):
    """Appends a line for each call: `{"step": ..., "time": ..., NAME: NUMBER, ...}`.

    A config is `{"config": {...}}`, a table `{"step": ..., "time": ..., "table": NAME, "rows": [{...}]}`.
    Each line is written at once; one that was cut off, by a kill or a full disk, does not spoil the next. A
    number that is not finite is null.

    Args:
        path: the file; it is made with its folders, and appended to if it exists.
        limits: of the queue.
    """

    def __init__(self, path: str | Path, *, limits: QueueLimits | None = None) -> None:
        super().__init__(_JsonlSink(Path(path)), limits)


class _JsonlSink:
    def __init__(self, path: Path) -> None:
        self.name = f"jsonl:{path}"
        self._path = path
        self._file: FileIO | None = None
        self._torn = False

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = FileIO(self._path, "a+")
        if self._file.seek(0, SEEK_END):
            self._file.seek(-1, SEEK_END)
            self._torn = self._file.read(1) != b"\n"

    def write_metrics(self, metrics: Mapping[str, float], step: int | None, time_s: float) -> None:
        self._write(
            {"step": step, "time": time_s} | {name: _finite(value) for name, value in metrics.items()}
        )

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._write({"config": config})

    def write_table(self, name: str, table: Table, step: int | None, time_s: float) -> None:
        rows = [{key: _finite(cell) for key, cell in row.items()} for row in table.to_dicts()]
        self._write({"step": step, "time": time_s, "table": name, "rows": rows})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        line = b"\n" * self._torn + json.dumps(record, default=str).encode() + b"\n"
        self._torn = True
        if self._file.write(line) != len(line):
            raise OSError(f"{self._path}: a line was written only in part")
        self._torn = False


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
