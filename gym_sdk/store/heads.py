"""What a store has to know of a line without building its rollout: whose it is and how it ended.

pydantic-core checks the JSON of the whole line but makes no objects of what is not asked for, which is what
makes opening a store fast.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, NamedTuple, NotRequired

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from typing_extensions import TypedDict

from gym_sdk.schema import Outcome, Rollout, RolloutKey, Task, as_items
from gym_sdk.schema.rollout import SCHEMA_VERSION

__all__ = ["Head", "NewerVersionError", "read_head", "read_line", "task_fingerprint"]


class NewerVersionError(ValueError):
    """A line is of a version that this library does not know; it is not damaged."""


class _TaskHead(TypedDict):
    input: Any
    id: NotRequired[str | None]
    instructions: NotRequired[str | None]


class _FailureHead(TypedDict):
    where: str


class _LineHead(TypedDict):
    id: str
    task: _TaskHead
    index: NotRequired[int]
    epoch: NotRequired[int]
    outcome: NotRequired[Outcome]
    failure: NotRequired[_FailureHead | None]
    reward: NotRequired[float | None]
    schema_version: NotRequired[int]


_HEADS = TypeAdapter(_LineHead)


class Head(NamedTuple):
    """The few fields of a line that a store works with."""

    key: RolloutKey
    outcome: Outcome
    reward: float | None
    failed_in: str | None
    """The stage in which it failed."""
    task_input: Any
    instructions: str | None

    @property
    def fingerprint(self) -> str:
        """The `task_fingerprint` of the rollout's task."""
        return _fingerprint(self.task_input, self.instructions)


def read_head(line: bytes) -> Head:
    """Read a line's head; the rest of the line is checked to be JSON, no more.

    Raises:
        ValueError: the line is not JSON, has no such head, or is of a newer version.
    """
    try:
        head = _HEADS.validate_json(line)
    except ValidationError as error:
        raise ValueError(_described(error)) from error
    version = head.get("schema_version", 1)
    if not 1 <= version <= SCHEMA_VERSION:
        raise NewerVersionError(
            f"version {version} of the data; this gym-sdk reads 1 to {SCHEMA_VERSION}: use a newer one"
        )
    task = head["task"]
    key = RolloutKey(task.get("id") or "", head.get("epoch", 0), head.get("index", 0))
    outcome = head.get("outcome", Outcome.COMPLETED)
    failure = head.get("failure")
    failed_in = failure["where"] if failure else None
    return Head(key, outcome, head.get("reward"), failed_in, task["input"], task.get("instructions"))


def read_line(line: bytes) -> Rollout:
    """Read a whole line.

    Raises:
        ValueError: it is not a rollout.
    """
    try:
        return Rollout.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(_described(error)) from error


def task_fingerprint(task: Task) -> str:
    """Return a short hash of what a task asks: its input and instructions.

    Two tasks that say the same have the same one, whether they were written as text, dicts or items, and it
    is the same after a round trip through a file. Answer, settings and metadata are not in it: to correct an
    answer is no other task.
    """
    return _fingerprint(task.input, task.instructions)


def _fingerprint(task_input: Any, instructions: str | None) -> str:
    said = task_input if isinstance(task_input, str) else to_json(_plain(task_input), fallback=str)
    text = said.encode(errors="replace") if isinstance(said, str) else b"\x01" + said
    if instructions is not None:
        text += b"\x00" + instructions.encode(errors="replace")
    return blake2b(text, digest_size=8).hexdigest()


def _plain(task_input: Any) -> Any:
    try:
        items: list[Any] = [item.to_wire() for item in as_items(task_input)]
    except (ValidationError, TypeError):  # no input that a policy would take; then it is compared as it is
        items = list(task_input) if isinstance(task_input, list | tuple) else [task_input]
    return _canonical(items)


def _canonical(value: Any) -> Any:
    """Sort names and leave out nulls: a file has those that nobody set."""
    if isinstance(value, dict):
        return {name: _canonical(value[name]) for name in sorted(value) if value[name] is not None}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    return value


def _described(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in detail["loc"])
    return f"not a rollout: {field + ': ' if field else ''}{detail['msg']}"
