"""Reading back what wandb wrote offline: protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32_768
_HEADER = 7  # of a chunk: checksum (4), length (2), kind (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records_in(path: Path) -> Iterator[Any]:
    """Yield the records of a `run-*.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    for data in _chunks(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def history_in(path: Path) -> list[dict[str, Any]]:
    """Return the logged rows, without wandb's own entries."""
    rows = []
    for record in records_in(path):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def _chunks(data: bytes) -> Iterator[bytes]:
    position, parts = 7, b""  # the file begins with wandb's own seven bytes
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        parts += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
