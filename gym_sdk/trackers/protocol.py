"""What a tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from gym_sdk.metrics import Table

__all__ = ["Sink", "Tracker"]


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of a run, and neither stops nor slows it.

    Only `aclose` waits, and no error of a service is raised.
    """

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Take numbers by name.

        Args:
            metrics: by name; `/` in a name groups it.
            step: what the x axis shows, e.g. the optimizer step. None: the order of the calls.
        """
        ...

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take the settings of the run; later ones are added to earlier ones."""
        ...

    def log_table(self, name: str, table: Table, *, step: int | None = None) -> None:
        """Take a table, e.g. `rollout_table(group.rollouts)` as samples."""
        ...

    async def aclose(self) -> None:
        """Deliver what was taken, within a deadline, and end. Closing again does nothing."""
        ...


class Sink(Protocol):
    """Where a `BackgroundTracker` delivers to. It may block and may raise; one thread calls it."""

    name: str
    """For messages, e.g. `wandb:project`."""

    def open(self) -> None:
        """Make it ready; called before anything else, and again some time after it failed."""
        ...

    def write_metrics(self, metrics: Mapping[str, float], step: int | None, time_s: float) -> None:
        """Deliver numbers that were logged at this Unix time, in seconds."""
        ...

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Deliver settings."""
        ...

    def write_table(self, name: str, table: Table, step: int | None, time_s: float) -> None:
        """Deliver a table."""
        ...

    def close(self) -> None:
        """Finish the run; called once, if it was opened."""
        ...
