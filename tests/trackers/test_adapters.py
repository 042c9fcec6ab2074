"""Each adapter with the real package, offline, read back by what the package itself offers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tracking import TABLE, log_a_run

from gym_sdk.trackers import JsonlTracker, TensorBoardTracker

TESTS = Path(__file__).parents[1]


def in_a_process(code: str, folder: Path) -> Any:
    """Run code in a fresh interpreter that knows `folder` and `log_a_run`; return the JSON it prints last."""
    head = (
        "import json, sys\nfrom pathlib import Path\nfrom support.tracking import begin, log_a_run\n"
        "folder = Path(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TRACKIO_DIR": str(folder / "trackio-files")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    log_a_run(JsonlTracker(path))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"config": {"lr": 0.5, "path": "x"}}
    assert [(line["step"], line["reward/mean"], line["loss"]) for line in lines[1:4]] == [
        (1, 0.25, None),
        (3, 0.75, None),
        (2, 0.5, None),
    ]
    assert lines[4]["table"] == "samples"
    assert lines[4]["rows"] == [{"task": "a", "reward": 1.0}, {"task": "b|c", "reward": None}]
    assert lines[1]["time"] <= lines[2]["time"]


def test_jsonl_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"', encoding="utf-8")
    tracker = JsonlTracker(path)
    tracker.log({"a": 3.0}, step=3)
    tracker.close()
    first, torn, third = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["step"] == 1
    assert torn == '{"step": 2, "a"'
    assert json.loads(third)["step"] == 3


def test_jsonl_of_a_full_disk_loses_lines_and_no_run(caplog: pytest.LogCaptureFixture) -> None:
    tracker = JsonlTracker("/dev/full")
    tracker.log({"a": 1.0}, step=1)
    tracker.log({"a": 2.0}, step=2)
    tracker.close()
    assert (tracker.delivered, tracker.failed) == (0, 2)
    assert "No space left" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path / "run")
    tracker.log({"alone": 7.0})
    tracker.log({"alone": 8.0})
    tracker.log_config({"lr": 0.5})
    for step in (1, 2):
        tracker.log({"reward/mean": step / 4, "loss": math.nan}, step=step)
    tracker.log_table("samples", TABLE, step=2)
    tracker.close()
    assert tracker.failed == 0
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [(event.step, event.value) for event in found.Scalars("alone")] == [(0, 7.0), (1, 8.0)]
    assert math.isnan(found.Scalars("loss")[0].value)
    config, samples = (
        found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in ("config", "samples")
    )
    assert '"lr": 0.5' in config
    assert "| b\\|c | - |" in samples
    assert found.SummaryMetadata("samples").plugin_data.plugin_name == "text"


def test_trackio(tmp_path: Path) -> None:
    code = """
from gym_sdk.trackers import TrackioTracker
one, two = TrackioTracker("project", "one"), TrackioTracker("project", "two")
begin(two)  # two runs at the same time
log_a_run(one)
log_a_run(two)
import trackio
runs = trackio.Api().runs("project")
from trackio.sqlite_storage import SQLiteStorage
logs = {run.name: SQLiteStorage.get_logs("project", run.name) for run in runs}
config = SQLiteStorage.get_run_config("project", "one")
print()
print(json.dumps([logs, config], default=str))
"""
    logs, config = in_a_process(code, tmp_path)
    assert set(logs) == {"one", "two"}
    for rows in logs.values():
        means = {row["step"]: row["reward/mean"] for row in rows if "reward/mean" in row}
        assert means == {1: 0.25, 2: 0.5, 3: 0.75}
        samples = next(row["samples"] for row in rows if "samples" in row)
        assert [row["task"] for row in samples["_value"]] == ["a", "b|c"]
    assert config["lr"] == 0.5


def test_wandb(tmp_path: Path) -> None:
    code = """
from gym_sdk.trackers import WandbTracker
options = {"mode": "offline", "dir": str(folder)}
one, two = (WandbTracker("project", name, options=options) for name in ("one", "two"))
begin(two)  # two runs at the same time
log_a_run(one)
log_a_run(two)
from support.wandb_files import history_in, records_in
runs = {}
for path in folder.glob("wandb/offline-run-*/*.wandb"):
    run = next(record.run for record in records_in(path) if record.WhichOneof("record_type") == "run")
    config = {
        entry.key: json.loads(entry.value_json)
        for record in records_in(path) if record.WhichOneof("record_type") == "config"
        for entry in record.config.update if entry.key != "_wandb"
    }
    runs[run.display_name] = [run.project, config, history_in(path)]
print()
print(json.dumps(runs))
"""
    runs = in_a_process(code, tmp_path)
    assert set(runs) == {"one", "two"}
    for project, config, rows in runs.values():
        assert project == "project"
        assert config == {"lr": 0.25, "path": "x"}
        assert [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row] == [
            (1, 0.25),
            (3, 0.75),
            (2, 0.5),
        ]
        samples = next(row for row in rows if any(key.startswith("samples") for key in row))
        assert samples["step"] == 3
