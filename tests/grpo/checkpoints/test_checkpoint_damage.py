"""Damaged checkpoints are refused by the name of the file; a full disk costs nothing that was there."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.checkpointed import state_at, tiny_model, tiny_optimizer, update, waiting_group

from gym_sdk.errors import CheckpointError
from gym_sdk.grpo.checkpoints import read_checkpoint, read_state, write_checkpoint
from gym_sdk.grpo.checkpoints.manifest import MANIFEST

FILES = (
    "config.json",
    "model.safetensors",
    "trainer/files.json",
    "trainer/replay.json",
    "trainer/replay.jsonl",
    "trainer/state.json",
    "trainer/state.pt",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    write(path, step=1)
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def write(path: Path, *, step: int) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    update(model, optimizer)
    replay = {step: [waiting_group(number) for number in range(15)]}  # the largest of the files
    write_checkpoint(path, model, state_at(step), optimizer=optimizer, replay=replay)


def refuse(path: Path, message: str) -> None:
    """Reading raises, and changes nothing."""
    model = tiny_model(seed=5)
    optimizer = tiny_optimizer(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path, model, optimizer)
    assert caught.value.path == str(path)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(path: Path, file: str) -> None:
    content = (path / file).read_bytes()
    flipped = bytearray(content)
    flipped[len(content) * 3 // 4] ^= 0x10
    for damaged in (content[: len(content) // 2], bytes(flipped), b"\x93" * len(content), b""):
        (path / file).write_bytes(damaged)
        refuse(path, f"{file}.*(Copy it again|go back)")
    (path / file).unlink()
    refuse(path, f"{file} (is missing|cannot be read)")


def test_every_file_but_the_manifest_is_in_it(whole: Path) -> None:
    listed = set(json.loads((whole / MANIFEST).read_text()))
    there = {file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file()}
    assert there - listed == {MANIFEST}
    assert set(FILES) <= there


def test_any_flipped_weight_is_noticed(path: Path) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuse(path, r"model\.safetensors is damaged: its SHA-256")


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "there is no checkpoint here")
    tiny_model().save_pretrained(tmp_path / "model")
    refuse(tmp_path / "model", "there is no checkpoint here")


def test_another_format_is_refused(path: Path) -> None:
    """Format 1 had no list of files."""
    file = path / "trainer" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    (path / MANIFEST).unlink()
    message = (
        "format 1 is not 2, which this version reads. To start anew from its weights, load it as a model"
    )
    refuse(path, message)
    file.write_text("[]")
    refuse(path, "format None is not 2")
    file.write_bytes(b"\xff")
    refuse(path, r"state\.json cannot be read")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Have the kernel refuse to let files grow beyond a size, in bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "full_at", ["config.json", "model.safetensors", "trainer/state.pt", "trainer/replay.jsonl"]
)
def test_a_full_disk_leaves_the_old_one(path: Path, full_at: str) -> None:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with largest_file(len(before[path / full_at]) - 1):
        with pytest.raises(CheckpointError, match=r"cannot be written: .*What was there before is whole"):
            write(path, step=2)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    write(path, step=2)
    assert read_state(path).step == 2
