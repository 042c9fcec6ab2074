"""How a stream admits, groups and keeps rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gym_sdk.errors import ConfigurationError
from gym_sdk.rollout.groups import DynamicSampling
from gym_sdk.rollout.source import Schedule
from gym_sdk.rollout.staleness import Staleness
from gym_sdk.schema import Rollout
from gym_sdk.trackers import Tracker

__all__ = ["StreamOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How a stream admits, groups and keeps rollouts.

    Raises:
        ConfigurationError: a value is out of range.
    """

    group_size: int = 1
    """Rollouts of each task."""
    schedule: Schedule = field(default_factory=Schedule)
    """When tasks are admitted."""
    dynamic: DynamicSampling = field(default_factory=DynamicSampling)
    """Spares, refills and early stops of groups."""
    staleness: Staleness | None = None
    """How old weights may be; None: that is not asked."""
    store: Path | None = None
    """Journal to which each rollout is appended when it finishes, and from which a run is resumed."""
    begun: tuple[Rollout, ...] = ()
    """Cancelled attempts to go on from."""
    keep_partial: bool = False
    """Whether rollouts that are cancelled stay: in the store, and in `RolloutStream.partial`."""
    progress: bool = False
    """Whether to show a progress bar."""
    tracker: Tracker | None = None
    """Gets the stream's metrics while it runs; its owner closes it."""
    metrics_every_s: float = 10.0
    """How often the tracker gets them, in seconds."""

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigurationError(f"group_size must be at least 1, not {self.group_size}")
        if not self.metrics_every_s > 0:
            raise ConfigurationError(f"metrics_every_s must be positive, not {self.metrics_every_s}")
