"""Tasks in JSONL files.

One JSON object per line; blank lines are skipped, and a name that ends in `.gz` is compressed. Fields:

| field | meaning |
| --- | --- |
| `input` (or `prompt`, or `question`) | text, or a list of Responses items; required |
| `answer` (or `expected_answer`) | what a verifier compares with; any JSON value |
| `id` | text or integer, unique in the file |
| `instructions` | system text |
| `settings` | object of request fields, e.g. `{"temperature": 0.7}` |
| `metadata` | object |

Every other field is added to the metadata. NeMo Gym's form is read too: the request under
`responses_create_params`, whose `input` and `instructions` become the task's and whose other fields (`tools`,
`temperature`, ...) become its settings.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from gym_sdk.errors import DatasetError
from gym_sdk.schema import Task, WireModel, as_items

__all__ = ["iter_tasks", "load_tasks", "save_tasks"]

_INPUTS = ("input", "prompt", "question")
_ANSWERS = ("answer", "expected_answer")
_REQUEST = "responses_create_params"


def load_tasks(path: str | Path) -> list[Task]:
    """Read all tasks of a JSONL file (its fields are described in this module's docstring).

    Raises:
        DatasetError: the file cannot be read, or a line is not a task; names file, line and field.
    """
    return list(iter_tasks(path))


def iter_tasks(path: str | Path) -> Iterator[Task]:
    """Read the tasks of a JSONL file one by one, for files larger than memory.

    Raises:
        DatasetError: as `load_tasks`, when the line at fault is reached.
    """
    path = Path(path)
    lines_of_ids: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            task = _read_task(line)
        except _FieldError as error:
            raise DatasetError(str(error), path=path, line=number, field=error.field) from error
        if task.id is not None:
            first = lines_of_ids.setdefault(task.id, number)
            if first != number:
                raise DatasetError(
                    f"`id` {task.id!r} is already the id of line {first}", path=path, line=number, field="id"
                )
        yield task


def save_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Write tasks to a JSONL file that `load_tasks` reads; the file appears whole or not at all.

    Raises:
        DatasetError: a task holds something that is not JSON, or the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _open(partial, "wb", compressed=path.suffix == ".gz") as file:
            for number, task in enumerate(tasks, start=1):
                file.write(_write_task(task, path, number) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise DatasetError(f"cannot be written: {error.strerror or error}", path=path) from error
    finally:
        partial.unlink(missing_ok=True)


class _FieldError(ValueError):
    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def _open(path: Path, mode: str, *, compressed: bool) -> Any:
    return gzip.open(path, mode) if compressed else path.open(mode)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path, "rb", compressed=path.suffix == ".gz") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield number, content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        line = number + 1 if number else None
        raise DatasetError(f"cannot be read: {reason}", path=path, line=line) from error


def _read_task(line: bytes) -> Task:
    row = _read_object(line)
    request = _take(row, _REQUEST, dict, "an object")
    source = "input" if request is not None else _only_one(row, _INPUTS)
    for name in ("input", "instructions"):
        if request is not None and name in request:
            if name in row:
                raise _FieldError(f"`{name}` stands twice: in the line and in `{_REQUEST}`", name)
            row[name] = request.pop(name)
    if source not in row:
        raise _FieldError("has no `input` (nor `prompt` or `question`)", "input")
    content = _check_input(row.pop(source), source)
    answer = _only_one(row, _ANSWERS)
    task = Task(
        content,
        answer=row.pop(answer) if answer is not None else None,
        id=_read_id(row),
        instructions=_take(row, "instructions", str, "text"),
        settings={**(request or {}), **(_take(row, "settings", dict, "an object") or {})},
        metadata=_take(row, "metadata", dict, "an object") or {},
    )
    for key in row:
        if key in task.metadata:
            raise _FieldError(f"`{key}` stands twice: in the line and in `metadata`", key)
    return dataclasses.replace(task, metadata={**task.metadata, **row})


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _FieldError(f"is not UTF-8: byte {error.start + 1} of the line") from error
    try:
        row = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        # the parser counts lines inside this one, which would mislead beside the file's line number
        raise _FieldError(f"is not JSON: {str(error).replace(' at line 1 column', ' at column')}") from error
    if not isinstance(row, dict):
        raise _FieldError(f"is {_kind(row)}, not a JSON object")
    return row


def _take(row: dict[str, Any], name: str, kind: type, expected: str) -> Any:
    """Remove an optional field from the row; null counts as absent."""
    value = row.pop(name, None)
    if value is not None and not isinstance(value, kind):
        raise _FieldError(f"`{name}` must be {expected}, not {_kind(value)}", name)
    return value


def _only_one(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    present = [name for name in names if name in row]
    if len(present) > 1:
        raise _FieldError(f"has both `{present[0]}` and `{present[1]}`", present[1])
    return present[0] if present else None


def _check_input(value: Any, name: str) -> str | list[Any]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _FieldError(f"`{name}` must be text or a list of items, not {_kind(value)}", name)
    if not value:
        raise _FieldError(f"`{name}` is an empty list", name)
    try:
        as_items(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise _FieldError(f"`{where}`: {first['msg']}", where) from error
    return value


def _read_id(row: dict[str, Any]) -> str | None:
    value = row.pop("id", None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _FieldError(f"`id` must be text or an integer, not {_kind(value)}", "id")
    return str(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "empty text" if value == "" else "text",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _write_task(task: Task, path: Path, number: int) -> bytes:
    row: dict[str, Any] = {"input": task.input if isinstance(task.input, str) else _wire(task.input)}
    for name in ("answer", "id", "instructions"):
        value = getattr(task, name)
        if value is not None:
            row[name] = value
    for name in ("settings", "metadata"):
        if getattr(task, name):
            row[name] = dict(getattr(task, name))
    for name, value in row.items():
        try:
            from_json(to_json(value, inf_nan_mode="constants"), allow_inf_nan=False)
        except ValueError as error:
            raise DatasetError(
                f"`{name}` is not JSON: {error}", path=path, line=number, field=name
            ) from error
    return to_json(row)


def _wire(items: Iterable[Any]) -> list[Any]:
    return [item.to_wire() if isinstance(item, WireModel) else item for item in items]
