"""Watches the metrics of a training run, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from gym_sdk.grpo.alarms.alarm import Alarm
from gym_sdk.grpo.alarms.config import AlarmConfig
from gym_sdk.grpo.alarms.rollout_rules import ROLLOUT_RULES, SUSTAINED
from gym_sdk.grpo.alarms.update_rules import UPDATE_RULES
from gym_sdk.grpo.alarms.view import MEDIANS, StepView

__all__ = ["AlarmWatch"]


class AlarmWatch:
    """Raises an alarm when it begins, and not again before it is over or `repeat_every` steps have passed.

    It only looks: nothing is logged, and training goes on.

    Args:
        config: the thresholds.
    """

    def __init__(self, config: AlarmConfig | None = None) -> None:
        self._config = config or AlarmConfig()
        self._history: dict[str, list[float]] = {name: [] for name in MEDIANS}
        self._streaks: dict[str, int] = {}
        self._raised_at: dict[str, int] = {}
        self._held_at: dict[str, int] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Look at the metrics of a step; return the alarms that it raises.

        Metrics that are missing raise nothing: a step without updates has no `entropy`, say.

        Args:
            step: which step they are of; greater than that of the last call.
            metrics: by the names of `docs/training_metrics.md`.
        """
        view = StepView(metrics, self._medians(), self._config)
        alarms = []
        for name, rule in [*UPDATE_RULES.items(), *ROLLOUT_RULES.items()]:
            finding = rule(view)
            if finding is None:
                self._streaks.pop(name, None)
                continue
            self._streaks[name] = self._streaks.get(name, 0) + 1
            needed = self._config.patience if name in SUSTAINED else 1
            if self._streaks[name] >= needed and self._is_news(name, step):
                alarms.append(Alarm(name, finding.message, finding.value, step))
        self._remember(metrics)
        return alarms

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON values."""
        return {
            "history": {name: list(values) for name, values in self._history.items()},
            "streaks": dict(self._streaks),
            "raised_at": dict(self._raised_at),
            "held_at": dict(self._held_at),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where another one was.

        Args:
            state: what its `state()` returned.
        """
        self._history = {name: list(state["history"].get(name, ())) for name in MEDIANS}
        self._streaks = dict(state["streaks"])
        self._raised_at = dict(state["raised_at"])
        self._held_at = dict(state["held_at"])

    def _is_news(self, name: str, step: int) -> bool:
        """Note that an alarm's cause is there; return whether to say so."""
        held_at = self._held_at.get(name)
        self._held_at[name] = step
        begins = held_at is None or step - held_at > self._config.quiet_steps
        if begins or step - self._raised_at[name] >= self._config.repeat_every:
            self._raised_at[name] = step
            return True
        return False

    def _medians(self) -> dict[str, float]:
        return {
            name: median(values)
            for name, values in self._history.items()
            if len(values) >= self._config.least_history
        }

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name, values in self._history.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                values.append(value)
            del values[: -self._config.window]
