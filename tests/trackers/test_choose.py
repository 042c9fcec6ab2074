"""Trackers by name, and packages that are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gym_sdk.errors import ConfigurationError
from gym_sdk.trackers import (
    JsonlTracker,
    QueueLimits,
    TensorBoardTracker,
    TrackioTracker,
    WandbTracker,
    tracker_for,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jsonl:runs/x.jsonl", JsonlTracker),
        ("tensorboard:/tmp/runs/x", TensorBoardTracker),
        ("trackio:project", TrackioTracker),
        ("trackio:project/run", TrackioTracker),
        ("wandb:project", WandbTracker),
        ("wandb:project/run", WandbTracker),
        ("wandb:entity/project/run", WandbTracker),
    ],
)
def test_a_name_makes_a_tracker(name: str, kind: type) -> None:
    assert type(tracker_for(name, limits=QueueLimits(entries=1))) is kind


def test_the_parts_of_a_name_arrive() -> None:
    arguments = tracker_for("wandb:me/project/run")._sink._arguments  # type: ignore[attr-defined]
    assert arguments == {"project": "project", "name": "run", "entity": "me"}
    arguments = tracker_for("trackio:project/run")._sink._arguments  # type: ignore[attr-defined]
    assert arguments == {"project": "project", "name": "run"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "wandb",
        "wandb:",
        "wandb:/run",
        "wandb:a/b/c/d",
        "trackio:a/b/c",
        "jsonl:",
        "tensorboard:",
        "mlflow:x",
    ],
)
def test_what_names_no_tracker_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="names no tracker; one is written as wandb:PROJECT"):
        tracker_for(name)


@pytest.mark.parametrize("package", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf'pip install "gym-sdk\[{package}\]"'):
        tracker_for(f"{package}:x")


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gym_sdk.trackers.packages import require

    (tmp_path / "left_by_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="needs the package left_by_a_run"):
        require("left_by_a_run", extra="x")


def test_making_trackers_imports_none_of_their_packages() -> None:
    code = (
        "from gym_sdk.trackers import tracker_for\n"
        "for name in ('wandb:x', 'trackio:x', 'tensorboard:x', 'jsonl:x'): tracker_for(name)\n"
        "import sys\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()).isdisjoint(
        {"wandb", "trackio", "tensorboard", "torch", "numpy", "openai", "aiohttp", "transformers"}
    )
