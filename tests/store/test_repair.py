"""Checking and repairing: what cannot be read goes aside, the rest stays, nothing is lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.stored_rollouts import attempt, failed

from gym_sdk.errors import StoreError
from gym_sdk.store import Damage, Journal, check, read_rollouts, repair, summarize


@pytest.fixture(params=["jsonl", "jsonl.zst"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"r.{request.param}"
    with Journal(path) as journal:
        for rollout in (failed(0), attempt(1), attempt(0), attempt(2, reward=0.0)):
            journal.write(rollout)
    return path


def test_a_sound_store_is_left_alone(path: Path) -> None:
    before = path.stat()
    for report in (check(path), repair(path)):
        assert (report.lines, report.rollouts, report.replaced) == (4, 3, 1)
        assert not report.damaged
        assert report.torn_bytes == 0
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert not path.with_name(path.name + ".damaged").exists()


def test_damaged_lines_go_aside(path: Path) -> None:
    path.chmod(0o640)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] = 0
    torn = data[: len(data) - 20]
    path.write_bytes(torn)
    report = check(path)
    assert (report.lines, report.rollouts, report.replaced) == (2, 1, 1)
    (damage,) = report.damaged
    assert isinstance(damage, Damage)
    assert damage.line == 2
    assert report.torn_bytes > 100
    assert path.read_bytes() == torn
    assert repair(path) == report
    assert list(read_rollouts(path, every=True)) == [failed(0), attempt(0)]
    aside = path.with_name(path.name + ".damaged").read_bytes()
    assert len(aside) >= damage.length + report.torn_bytes
    assert torn.endswith(aside[-report.torn_bytes - 1 : -1])
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in sorted(path.parent.iterdir())] == [path.name, path.name + ".damaged"]
    with Journal(path) as journal:
        journal.write(attempt(5))
    assert not check(path).damaged


def test_json_that_is_no_rollout(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Journal(path) as journal:
        journal.write(attempt(0))
    with path.open("ab") as file:
        file.write(b'{"id":"ro_x","task":{"input":"q","id":"t"}}\n')
    with Journal(path) as journal:  # the head is sound
        with pytest.raises(StoreError, match="timing: Field required"):
            journal.load(("t", 0, 0))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"r\.jsonl:2: not a rollout: timing"):
        list(read_rollouts(path))
    with pytest.raises(StoreError, match=r"r\.jsonl:2: not a rollout: timing"):
        list(read_rollouts(path, every=True))
    assert [damage.line for damage in repair(path).damaged] == [2]
    assert list(read_rollouts(path)) == [attempt(0)]


def test_a_newer_version_is_not_damage(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(attempt().model_dump_json().replace('"schema_version":3', '"schema_version":99') + "\n")
    before = path.read_bytes()
    for use in (check, repair, summarize):
        with pytest.raises(StoreError, match=r"version 99 of the data.*use a newer one"):
            use(path)
    assert path.read_bytes() == before


def test_a_store_that_is_in_use_is_not_repaired(path: Path) -> None:
    with Journal(path):
        with pytest.raises(StoreError, match="has this store open"):
            repair(path)
    with pytest.raises(StoreError, match="No such file"):
        repair(path.with_name("missing.jsonl"))


def test_an_interrupted_repair_may_be_done_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(StoreError, match="Input/output error"):
        repair(path)
    monkeypatch.undo()
    assert path.read_bytes() == data
    damaged = check(path)
    assert len(damaged.damaged) == 1
    assert repair(path) == damaged
    assert not check(path).damaged


def test_random_damage_costs_only_the_lines_it_touches(path: Path) -> None:
    whole, chance = path.read_bytes(), random.Random(3)
    written = [rollout.model_dump_json() for rollout in read_rollouts(path, every=True)]
    for _ in range(60):
        start, length = chance.randrange(len(whole)), chance.randrange(1, 60)
        path.write_bytes(whole[:start] + chance.randbytes(length) + whole[start + length :])
        repair(path)
        assert not check(path).damaged
        kept = {rollout.model_dump_json() for rollout in read_rollouts(path, every=True)}
        assert sum(line in kept for line in written) >= 2  # it touches two lines at most


def test_summaries_count_the_last_lines(path: Path) -> None:
    summary = summarize(path)
    assert (summary.lines, summary.rollouts, summary.tasks, summary.epochs) == (4, 3, 3, 1)
    assert summary.outcomes["completed"] == 3
    assert summary.outcomes["failed"] == 0
    assert (summary.rewarded, summary.mean_reward) == (3, 2 / 3)
    assert summary.size_bytes == path.stat().st_size
    with Journal(path) as journal:
        journal.write(failed(2))
    summary = summarize(path)
    assert (summary.rewarded, summary.mean_reward, summary.outcomes["failed"]) == (2, 1.0, 1)
    assert "failed=1" in str(summary)
    assert "mean_reward=1" in str(summary)
