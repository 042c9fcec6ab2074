"""Merging the shards of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.stored_rollouts import attempt, failed

from gym_sdk.errors import ConfigurationError, StoreError
from gym_sdk.schema import Rollout, Task
from gym_sdk.store import Journal, merge, read_rollouts


def store(path: Path, rollouts: Sequence[Rollout]) -> Path:
    with Journal(path) as journal:
        for rollout in rollouts:
            journal.write(rollout)
    return path


def test_shards_become_one(tmp_path: Path) -> None:
    one = store(tmp_path / "1.jsonl", [failed(0), attempt(1), failed(2), attempt(0)])
    two = store(tmp_path / "2.jsonl.zst", [attempt(2), attempt(1), failed(3), attempt(4, epoch=1)])
    for out in (tmp_path / "all.jsonl", tmp_path / "all.jsonl.zst"):
        report = merge([one, two], out)
        assert (report.rollouts, report.repeated, report.replaced) == (5, 1, 1)
        expected = [attempt(1), attempt(0), attempt(2), failed(3), attempt(4, epoch=1)]
        assert list(read_rollouts(out, every=True)) == expected
    assert next(read_rollouts(one)) == attempt(1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "1.jsonl",
        "2.jsonl.zst",
        "all.jsonl",
        "all.jsonl.zst",
    ]


def test_a_finished_rollout_wins_in_either_order(tmp_path: Path) -> None:
    bad, good = store(tmp_path / "bad", [failed(0)]), store(tmp_path / "good", [attempt(0)])
    for number, paths in enumerate([[bad, good], [good, bad]]):
        merge(paths, tmp_path / f"{number}")
        assert list(read_rollouts(tmp_path / f"{number}")) == [attempt(0)]


def test_two_different_finished_ones_need_a_word(tmp_path: Path) -> None:
    paths = [store(tmp_path / said, [attempt(0, said=said)]) for said in ("one", "two", "three")]
    out = tmp_path / "deep" / "out.jsonl"
    with pytest.raises(StoreError, match=r"one: .*task-0.*differently, in .*two.*prefer='first' or 'last'"):
        merge(paths, out)
    assert not out.exists()
    merge(paths, out, prefer="first")
    merge(paths, tmp_path / "last.jsonl", prefer="last")
    assert [rollout.output_text for rollout in read_rollouts(out)] == ["one"]
    assert [rollout.output_text for rollout in read_rollouts(tmp_path / "last.jsonl")] == ["three"]


def test_the_same_rollout_of_an_older_version_is_the_same(tmp_path: Path) -> None:
    new, old = store(tmp_path / "new", [attempt(0)]), tmp_path / "old"
    line = new.read_text().replace('"epoch":0,', "").replace('"schema_version":3', '"schema_version":2')
    old.write_text(line)
    assert merge([old, new], tmp_path / "out").repeated == 1


def test_other_tasks_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    one = store(tmp_path / "one", [attempt(0)])
    two = store(tmp_path / "two", [attempt(task=Task("something else", id="task-0"))])
    with pytest.raises(StoreError, match="'task-0' is another one in"):
        merge([one, two], tmp_path / "out", prefer="last")


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    one = store(tmp_path / "one", [attempt(0)])
    with pytest.raises(ConfigurationError, match="no store"):
        merge([], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="named twice"):
        merge([one, tmp_path / "." / "one"], tmp_path / "out")
    with pytest.raises(StoreError, match="exists already"):
        merge([one], one)
    with pytest.raises(StoreError, match="cannot be read"):
        merge([one, tmp_path / "missing"], tmp_path / "out")
    with one.open("ab") as file:
        file.write(b"junk\n")
    with pytest.raises(StoreError, match="one:2: "):
        merge([one], tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]


def test_one_store_loses_its_replaced_lines(tmp_path: Path) -> None:
    one = store(tmp_path / "one.jsonl", [failed(0), attempt(1), attempt(0)])
    with one.open("ab") as file:
        file.write(b'{"id":"torn')
    assert merge([one], tmp_path / "out.jsonl.zst").rollouts == 2
    assert list(read_rollouts(tmp_path / "out.jsonl.zst", every=True)) == [attempt(1), attempt(0)]
