"""A tracker that writes TensorBoard's event files; needs neither torch nor TensorFlow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gym_sdk.metrics import Table
from gym_sdk.trackers.background import BackgroundTracker, QueueLimits
from gym_sdk.trackers.packages import require

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker(BackgroundTracker):
    """Writes scalars, and configs and tables as text, into a folder that `tensorboard --logdir` shows.

    Entries without a step are numbered in the order in which they come, by name.

    Args:
        folder: the run's folder; each tracker writes a file of its own in it.
        limits: of the queue.

    Raises:
        ConfigurationError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: str | Path, *, limits: QueueLimits | None = None) -> None:
        require("tensorboard", extra="tensorboard")
        super().__init__(_TensorBoardSink(Path(folder)), limits)


class _TensorBoardSink:
    def __init__(self, folder: Path) -> None:
        self.name = f"tensorboard:{folder}"
        self._folder = folder
        self._writer: Any = None
        self._steps: dict[str, int] = {}
        self._config: dict[str, Any] = {}

    def open(self) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(self._folder))

    def write_metrics(self, metrics: Mapping[str, float], step: int | None, time_s: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        by_step: dict[int, list[Any]] = {}
        for name, value in metrics.items():
            entry = Summary.Value(tag=name, simple_value=float(value))
            by_step.setdefault(self._step(name, step), []).append(entry)
        for at, values in by_step.items():
            self._write(Summary(value=values), at, time_s)

    def write_config(self, config: Mapping[str, Any]) -> None:
        self._config |= config
        shown = json.dumps(self._config, indent=2, default=str)
        self._write_text("config", f"```json\n{shown}\n```", self._step("config", None), time.time())

    def write_table(self, name: str, table: Table, step: int | None, time_s: float) -> None:
        self._write_text(name, table.to_markdown(), self._step(name, step), time_s)

    def close(self) -> None:
        self._writer.close()

    def _step(self, name: str, step: int | None) -> int:
        at = self._steps.get(name, 0) if step is None else step
        self._steps[name] = at + 1
        return at

    def _write_text(self, tag: str, text: str, step: int, time_s: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        plugin = SummaryMetadata.PluginData(plugin_name="text")
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
        self._write(Summary(value=[value]), step, time_s)

    def _write(self, summary: Any, step: int, time_s: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time_s, step=step, summary=summary))
        self._writer.flush()
