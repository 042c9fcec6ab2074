"""A tracker that logs to Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gym_sdk.metrics import Table
from gym_sdk.trackers.background import BackgroundTracker, QueueLimits
from gym_sdk.trackers.packages import require

__all__ = ["WandbTracker"]


class WandbTracker(BackgroundTracker):
    """Logs to a run of its own; any number of them live in one process.

    The step is a metric called `step` and the x axis of all others, so that steps may come in any order and
    from several places (wandb's own step must not go back, and drops what does).

    Args:
        project: the project's name.
        run: the run's name; wandb makes one up by default.
        entity: user or team; the default one of the account by default.
        limits: of the queue. wandb connects and uploads within `close_s`; without a network, it may hold the
            end of the process for as long again.
        options: further arguments of `wandb.init`, e.g. `{"mode": "offline", "dir": "runs"}`; `settings` is a
            dict.

    Raises:
        ConfigurationError: the package `wandb` is not installed.
    """

    def __init__(
        self,
        project: str,
        run: str | None = None,
        *,
        entity: str | None = None,
        limits: QueueLimits | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require("wandb", extra="wandb")
        arguments = {"project": project, "name": run, "entity": entity, **(options or {})}
        limits = limits or QueueLimits()
        super().__init__(_WandbSink(arguments, init_timeout_s=limits.close_s), limits)


class _WandbSink:
    def __init__(self, arguments: Mapping[str, Any], *, init_timeout_s: float) -> None:
        self.name = f"wandb:{arguments['project']}"
        self._arguments = arguments
        self._init_timeout_s = init_timeout_s
        self._run: Any = None

    def open(self) -> None:
        import wandb

        # the caller's other runs stay, and so do its stdout and signal handlers
        settings = {"console": "off", "silent": True, "init_timeout": self._init_timeout_s}
        settings |= self._arguments.get("settings", {})
        arguments = {"reinit": "create_new", **self._arguments, "settings": settings}
        self._run = wandb.init(**arguments)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write_metrics(self, metrics: Mapping[str, float], step: int | None, time_s: float) -> None:
        self._run.log(dict(metrics) | _at(step))

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def write_table(self, name: str, table: Table, step: int | None, time_s: float) -> None:
        import wandb

        shown = wandb.Table(
            columns=list(table.columns), data=[list(row) for row in table.rows], allow_mixed_types=True
        )
        self._run.log({name: shown} | _at(step))

    def close(self) -> None:
        self._run.finish()


def _at(step: int | None) -> dict[str, int]:
    return {} if step is None else {"step": step}
