"""Trackers by their names, as a command line or a config file spells them."""

from __future__ import annotations

from gym_sdk.errors import ConfigurationError
from gym_sdk.trackers.background import BackgroundTracker, QueueLimits
from gym_sdk.trackers.jsonl import JsonlTracker
from gym_sdk.trackers.tensorboard import TensorBoardTracker
from gym_sdk.trackers.trackio import TrackioTracker
from gym_sdk.trackers.wandb import WandbTracker

__all__ = ["tracker_for"]

_FORMS = (
    "wandb:PROJECT, wandb:PROJECT/RUN, wandb:ENTITY/PROJECT/RUN, trackio:PROJECT, trackio:PROJECT/RUN, "
    "tensorboard:FOLDER or jsonl:FILE"
)


def tracker_for(name: str, *, limits: QueueLimits | None = None) -> BackgroundTracker:
    """Return the tracker that a text names.

    `wandb:project`, `wandb:project/run`, `wandb:entity/project/run`, `trackio:project`,
    `trackio:project/run`, `tensorboard:runs/x`, `jsonl:file`.

    Args:
        name: the kind, a colon, and where to.
        limits: of the tracker's queue.

    Raises:
        ConfigurationError: the text names no tracker, or its package is not installed.
    """
    kind, _, target = name.partition(":")
    parts = target.split("/")
    match kind:
        case "jsonl" if target:
            return JsonlTracker(target, limits=limits)
        case "tensorboard" if target:
            return TensorBoardTracker(target, limits=limits)
        case "trackio" if all(parts) and len(parts) <= 2:
            return TrackioTracker(*parts, limits=limits)
        case "wandb" if all(parts) and len(parts) <= 2:
            return WandbTracker(*parts, limits=limits)
        case "wandb" if all(parts) and len(parts) == 3:
            entity, project, run = parts
            return WandbTracker(project, run, entity=entity, limits=limits)
    raise ConfigurationError(f"{name!r} names no tracker; one is written as {_FORMS}")
