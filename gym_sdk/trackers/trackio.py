"""A tracker that logs to trackio: local by default, or a Space on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gym_sdk.metrics import Table
from gym_sdk.trackers.background import BackgroundTracker, QueueLimits
from gym_sdk.trackers.packages import require

__all__ = ["TrackioTracker"]


class TrackioTracker(BackgroundTracker):
    """Logs to a run that `trackio show` displays.

    Configs are kept until the first numbers come, because trackio takes them only when a run begins; later
    ones are logged as a table.

    Args:
        project: the project's name.
        run: the run's name; trackio makes one up by default.
        limits: of the queue.
        options: further arguments of `trackio.init`, e.g. `{"space_id": "me/runs"}`.

    Raises:
        ConfigurationError: the package `trackio` is not installed.
    """

    def __init__(
        self,
        project: str,
        run: str | None = None,
        *,
        limits: QueueLimits | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require("trackio", extra="trackio")
        super().__init__(_TrackioSink({"project": project, "name": run, **(options or {})}), limits)


class _TrackioSink:
    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.name = f"trackio:{arguments['project']}"
        self._arguments = dict(arguments)
        self._config: dict[str, Any] = dict(self._arguments.pop("config", {}))
        self._run: Any = None

    def open(self) -> None:
        import trackio  # noqa: F401  # what is broken shows before anything is taken

    def write_metrics(self, metrics: Mapping[str, float], step: int | None, time_s: float) -> None:
        self._begun().log(dict(metrics), step=step)

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._config |= config
        if self._run is not None:
            rows = tuple((name, str(value)) for name, value in config.items())
            self.write_table("config", Table(("name", "value"), rows), None, 0.0)

    def write_table(self, name: str, table: Table, step: int | None, time_s: float) -> None:
        import trackio

        shown = trackio.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._begun().log({name: shown}, step=step)

    def close(self) -> None:
        if self._run is None and self._config:
            self._begun()
        if self._run is not None:
            self._run.finish()

    def _begun(self) -> Any:
        if self._run is None:
            import trackio

            arguments = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False} | self._arguments
            self._run = trackio.init(config=self._config, **arguments)
        return self._run
