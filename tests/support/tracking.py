"""A short run for a tracker to take."""

from __future__ import annotations

import math
import time
from pathlib import Path

from gym_sdk.metrics import Table
from gym_sdk.trackers import BackgroundTracker

TABLE = Table(("task", "reward"), (("a", 1.0), ("b|c", None)))


def log_a_run(tracker: BackgroundTracker) -> None:
    """Log config, numbers and a table, close the tracker, and see that it took everything."""
    tracker.log_config({"lr": 0.5, "path": Path("x")})
    for step in (1, 3, 2):  # a resumed run goes back
        tracker.log({"reward/mean": step / 4, "loss": math.nan}, step=step)
    tracker.log_table("samples", TABLE, step=3)
    tracker.log_config({"lr": 0.25})
    tracker.close()
    assert (tracker.dropped, tracker.failed) == (0, 0)
    assert tracker.delivered >= 6


def begin(tracker: BackgroundTracker, *, timeout_s: float = 30.0) -> None:
    """Log one number, and wait until the service has it."""
    tracker.log({"early": 1.0}, step=0)
    deadline_s = time.monotonic() + timeout_s
    while tracker.delivered < 1:
        assert time.monotonic() < deadline_s, "nothing was delivered"
        time.sleep(0.01)
