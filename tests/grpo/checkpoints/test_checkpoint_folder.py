"""Which checkpoints are kept, found, and locked."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpointed import state_at

from gym_sdk.errors import CheckpointError, ConfigurationError
from gym_sdk.grpo.checkpoints import CheckpointFolder
from gym_sdk.grpo.checkpoints.folders import new_folder
from gym_sdk.grpo.checkpoints.manifest import write_manifest
from gym_sdk.grpo.checkpoints.state import write_state


def put(path: Path, step: int, score: float | None = None) -> Path:
    """Write a checkpoint without a model, which a folder does not look at."""
    with new_folder(path) as folder:
        (folder / "trainer").mkdir()
        (folder / "model.safetensors").write_text("weights")
        write_state(folder, state_at(step, score=score))
        write_manifest(folder)
    return path


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[CheckpointFolder]:
    with CheckpointFolder(tmp_path / "run", keep_last=2, keep_best=1) as folder:
        yield folder


def fill(checkpoints: CheckpointFolder, *scores: float | None) -> None:
    for step, score in enumerate(scores, start=1):
        put(checkpoints.path(step), step, score)
        checkpoints.prune()


def test_the_newest_and_the_best_stay(checkpoints: CheckpointFolder) -> None:
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    fill(checkpoints, 0.1, 0.9, 0.9, None, 0.5, None)
    assert steps(checkpoints.folder) == ["step-000002", "step-000005", "step-000006"]
    assert checkpoints.latest() == checkpoints.folder / "step-000006"
    assert checkpoints.best() == checkpoints.folder / "step-000002"


def test_without_scores_there_is_no_best(checkpoints: CheckpointFolder) -> None:
    fill(checkpoints, None, None, None)
    assert steps(checkpoints.folder) == ["step-000002", "step-000003"]
    assert checkpoints.best() is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.none() | st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_pruning_follows_its_rule(
    tmp_path_factory: pytest.TempPathFactory,
    scores: list[float | None],
    keep_last: int,
    keep_best: int,
) -> None:
    """Pruning after each write leaves what one look at all of them would have chosen."""
    folder = tmp_path_factory.mktemp("run")
    with CheckpointFolder(folder, keep_last=keep_last, keep_best=keep_best) as checkpoints:
        fill(checkpoints, *scores)
    numbers = range(1, len(scores) + 1)
    scored = [step for step in numbers if scores[step - 1] is not None]
    best = sorted(scored, key=lambda step: (-(scores[step - 1] or 0.0), step))[:keep_best]
    kept = {*list(numbers)[-keep_last:], *best}
    assert steps(folder) == [f"step-{step:06d}" for step in sorted(kept)]


def test_due() -> None:
    folder = CheckpointFolder("nowhere", every=3)
    assert [step for step in range(1, 8) if folder.is_due(step)] == [3, 6]
    assert not CheckpointFolder("nowhere").is_due(1)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be at least 1 step, or None, not 0"),
        ({"keep_last": 0}, "keep_last must be at least 1, not 0"),
        ({"keep_best": -1}, "keep_best must be at least 0, not -1"),
    ],
)
def test_numbers_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CheckpointFolder("nowhere", **arguments)


def test_one_trainer_at_a_time_and_any_number_of_readers(checkpoints: CheckpointFolder) -> None:
    fill(checkpoints, 0.5)
    with pytest.raises(CheckpointError, match=r"another trainer writes its checkpoints here.*Give each run"):
        CheckpointFolder(checkpoints.folder).__enter__()
    reader = CheckpointFolder(checkpoints.folder)
    assert reader.latest() == reader.best() == checkpoints.folder / "step-000001"
    for write in (reader.prune, lambda: reader.path(2), lambda: reader.rewind(0)):
        with pytest.raises(CheckpointError, match="is not entered"):
            write()
    checkpoints.__exit__(None, None, None)
    with CheckpointFolder(checkpoints.folder) as second:
        assert second.path(2) == checkpoints.folder / "step-000002"


def test_leftovers_of_a_kill_are_cleared_up(checkpoints: CheckpointFolder) -> None:
    folder = checkpoints.folder
    fill(checkpoints, None, None)
    checkpoints.__exit__(None, None, None)
    (folder / "step-000001").replace(folder / ".step-000001.removed")
    (folder / "step-000002").replace(folder / ".step-000002.previous")
    shutil.copytree(folder / ".step-000002.previous", folder / ".step-000002.0123abcd.partial")
    put(folder / "step-000003", 3)
    put(folder / ".step-000003.previous", 3)
    (folder / "notes").mkdir()
    assert CheckpointFolder(folder).latest() == folder / "step-000003"
    shutil.rmtree(folder / "step-000003")
    assert CheckpointFolder(folder).latest() == folder / ".step-000003.previous"
    with CheckpointFolder(folder) as again:
        assert again.latest() == folder / "step-000003"
        assert steps(folder) == ["notes", "step-000002", "step-000003"]


def test_what_is_not_whole_is_skipped_and_stays(
    checkpoints: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    fill(checkpoints, 0.1, 0.2)
    folder = checkpoints.folder
    (put(folder / "step-000003", 3, 0.9) / "model.safetensors").unlink()
    (folder / "step-000004").mkdir()
    (put(folder / "step-000005", 5) / "trainer" / "state.json").write_text("{")
    assert checkpoints.latest() == folder / "step-000002"
    assert checkpoints.best() == folder / "step-000002"
    assert "step-000003: model.safetensors is missing" in caplog.text
    put(folder / "step-000006", 6)
    checkpoints.prune()
    assert steps(folder) == [f"step-{step:06d}" for step in (2, 3, 4, 5, 6)]


def test_a_run_that_went_back_does_not_jump_ahead(checkpoints: CheckpointFolder) -> None:
    fill(checkpoints, 0.9, 0.1, 0.2, 0.3)
    with pytest.raises(CheckpointError, match=r"a checkpoint of step 4, which is later than step 2.*rewind"):
        checkpoints.path(2)
    checkpoints.rewind(1)
    assert steps(checkpoints.folder) == ["step-000001"]
    assert checkpoints.path(2) == checkpoints.folder / "step-000002"


def test_a_failing_removal_is_a_warning(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is made up: who may do everything is refused no removal."""

    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    fill(checkpoints, None, None)
    put(checkpoints.path(3), 3)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("gym_sdk.grpo.checkpoints.checkpoint_folder.shutil.rmtree", refuse)
        checkpoints.prune()
    assert "step-000001 could not be removed: [Errno 5]" in caplog.text
    assert checkpoints.latest() == checkpoints.folder / "step-000003"


def test_numbers_grow_beyond_their_width(checkpoints: CheckpointFolder) -> None:
    for step in (999_999, 1_000_000):
        put(checkpoints.path(step), step)
    assert checkpoints.latest() == checkpoints.folder / "step-1000000"
