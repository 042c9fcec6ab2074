"""One tracker that is several."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import anyio

from gym_sdk.metrics import Table
from gym_sdk.trackers.protocol import Tracker

__all__ = ["Tee", "tee"]


def tee(*trackers: Tracker) -> Tee:
    """Return a tracker that passes everything on to each of these, and closes them."""
    return Tee(trackers)


class Tee:
    """Passes everything on to each of its trackers; they are closed at the same time.

    Args:
        trackers: they belong to it from now on.
    """

    def __init__(self, trackers: tuple[Tracker, ...]) -> None:
        self.trackers = trackers

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Take numbers by name (see `Tracker.log`)."""
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take settings of the run (see `Tracker.log_config`)."""
        for tracker in self.trackers:
            tracker.log_config(config)

    def log_table(self, name: str, table: Table, *, step: int | None = None) -> None:
        """Take a table (see `Tracker.log_table`)."""
        for tracker in self.trackers:
            tracker.log_table(name, table, step=step)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all of them; none waits for another."""
        async with anyio.create_task_group() as group:
            for tracker in self.trackers:
                group.start_soon(tracker.aclose)
