"""Where a training run stands: `trainer/state.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gym_sdk.errors import CheckpointError, ConfigurationError

__all__ = ["TrainerState", "read_state", "write_state"]

_FILE = "trainer/state.json"
_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a training run stands.

    Raises:
        ConfigurationError: a score is not finite.
    """

    step: int
    """Completed steps."""
    position: int
    """Batches of tasks drawn."""
    weight_step: int
    """The step after which the weights last changed; names their version."""
    tasks: str
    """Fingerprint of the order of tasks (`TaskOrder.fingerprint`)."""
    config: dict[str, Any]
    """The trainer's settings, for the record: what JSON cannot say is written as text."""
    score: float | None = None
    """What the latest evaluation said of these weights, higher is better; None: they were not evaluated."""
    best_score: float | None = None
    """The best score of the run so far; None: nothing was evaluated yet."""
    more: dict[str, Any] = field(default_factory=dict)
    """Whatever else the trainer has to remember: JSON values under names of its own."""

    def __post_init__(self) -> None:
        for name in ("score", "best_score"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigurationError(f"{name} must be finite or None, not {value!r}")


def write_state(folder: Path, state: TrainerState) -> None:
    """Write the state into a checkpoint that is being made.

    Raises:
        ConfigurationError: `more` has what JSON cannot say.
    """
    record = {"format": _FORMAT} | asdict(state)
    record["config"] = json.loads(json.dumps(record["config"], default=str))
    try:
        text = json.dumps(record, indent=1)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the trainer's state.more must be JSON values: {error}") from error
    (folder / _FILE).write_text(text, encoding="utf-8")


def read_state(path: Path) -> TrainerState:
    """Read where the run stood that wrote a checkpoint; the checkpoint's other files are not looked at.

    Raises:
        CheckpointError: there is no checkpoint, its state is damaged, or it has another format.
    """
    try:
        record = json.loads((path / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint here (no {_FILE})", path=path) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{_FILE} cannot be read: {error}", path=path) from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != _FORMAT:
        raise CheckpointError(
            f"format {found!r} is not {_FORMAT}, which this version reads. To start anew from its weights, "
            "load it as a model",
            path=path,
        )
    names = [entry.name for entry in fields(TrainerState)]
    if missing := [name for name in names if name not in record]:
        raise CheckpointError(f"{_FILE} lacks {', '.join(missing)}", path=path)
    return TrainerState(**{name: record[name] for name in names})
