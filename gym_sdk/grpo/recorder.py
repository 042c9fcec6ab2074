"""What is told of each step: its line in `metrics.jsonl`, the tracker, and alarms."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from gym_sdk.grpo.alarms import Alarm, AlarmConfig, AlarmWatch
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.metrics import MetricsFile
from gym_sdk.trackers import Tracker

__all__ = ["StepRecorder"]

_log = logging.getLogger(__name__)


class StepRecorder:
    """Writes down the numbers of each step, and warns where they look wrong.

    Args:
        config: the trainer's settings; the tracker gets them.
        output_dir: gets `metrics.jsonl`. None: nothing is written.
        tracker: gets the metrics of each step.
    """

    def __init__(
        self, config: GRPOConfig, *, output_dir: str | Path | None = None, tracker: Tracker | None = None
    ) -> None:
        self._file = MetricsFile(Path(output_dir) / "metrics.jsonl") if output_dir else None
        self._tracker = tracker
        self._watch = AlarmWatch(_alarms(config))
        if tracker is not None:
            tracker.log_config(dataclasses.asdict(config))

    def step(self, step: int, metrics: dict[str, float]) -> list[Alarm]:
        """Record a step; return the alarms that its numbers raise."""
        self.numbers(step, metrics)
        _log.debug("step %d: %s", step, metrics)
        alarms = self._watch.check(step, metrics)
        for alarm in alarms:
            _log.warning("%s", alarm)
        return alarms

    def numbers(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers that belong to a step, such as those of an evaluation before the first."""
        if self._file is not None:
            self._file.append(step, metrics)
        if self._tracker is not None:
            self._tracker.log(metrics, step=step)

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON values."""
        return self._watch.state()

    def restart(self) -> None:
        """Begin anew: lines of an earlier run, which made no checkpoint, are removed."""
        if self._file is not None:
            self._file.keep_until(-1)

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Go on after a step of an earlier run: lines of later steps are removed."""
        if self._file is not None:
            self._file.keep_until(step)
        self._watch.restore(state)


def _alarms(config: GRPOConfig) -> AlarmConfig:
    """Return the thresholds, that of staleness filled in."""
    if config.alarms.max_staleness is not None:
        return config.alarms
    return dataclasses.replace(config.alarms, max_staleness=config.max_staleness)
