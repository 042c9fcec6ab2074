"""A rollout that a scheduler started."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gym_sdk.rollout.groups import OpenGroup
from gym_sdk.rollout.run import RolloutRun
from gym_sdk.schema import Cancellation

__all__ = ["Flight"]


@dataclass(slots=True, eq=False)
class Flight:
    """A rollout in flight."""

    group: OpenGroup
    index: int
    run: RolloutRun
    task: asyncio.Task[None] | None = None
    has_begun: bool = False
    reason: Cancellation | None = None
    """Why it was cancelled, if it was."""

    def cancel(self, reason: Cancellation) -> None:
        """Cancel it, unless it was before."""
        if self.reason is None:
            self.reason = reason
            if self.has_begun and self.task is not None:  # otherwise it would end without having run at all
                self.task.cancel()
