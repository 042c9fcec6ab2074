"""Journals whose writer is killed at any byte, and disks that are full."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stored_rollouts import attempt, failed, key

from gym_sdk.errors import StoreError
from gym_sdk.schema import Rollout, RolloutKey
from gym_sdk.store import Journal, check, read_rollouts
from gym_sdk.store.formats import format_of
from gym_sdk.store.journal import to_line
from gym_sdk.store.scanning import LastLines

SUFFIXES = ("jsonl", "jsonl.zst")
TRICKY = 'ü\u2028東京 👩\u200d👧 \x00\x1f "quoted" \\u00e9 {"id":"x"}\n'


class Written:
    """A journal's bytes, and how much of it holds how many rollouts."""

    def __init__(self, folder: Path, suffix: str) -> None:
        path = folder / f"whole.{suffix}"
        self.rollouts = [failed(1), attempt(2, said=TRICKY, reward=float("nan"))]
        self.ends = []
        with Journal(path) as journal:
            for rollout in self.rollouts:
                journal.write(rollout)
                self.ends.append(path.stat().st_size)
        self.data = path.read_bytes()

    def acknowledged(self, length: int) -> int:
        return sum(end <= length for end in self.ends)


@pytest.fixture(scope="module", params=SUFFIXES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, Path]:
    folder = tmp_path_factory.mktemp("cut")
    return Written(folder, request.param), folder / f"cut.{request.param}"


def test_cut_at_any_byte(written: tuple[Written, Path]) -> None:
    """Opening loses nothing that was acknowledged, and appending goes on. In the last line every byte."""
    whole, path = written
    for length in [*range(0, whole.ends[0], 23), *range(whole.ends[0] - 3, len(whole.data) + 1)]:
        path.write_bytes(whole.data[:length])
        kept = whole.acknowledged(length)
        kept += length + 1 in whole.ends and path.suffix == ".jsonl"  # whole but for the newline
        assert [rollout.id for rollout in read_rollouts(path)] == [r.id for r in whole.rollouts[:kept]]
        with Journal(path) as journal:
            assert [k.task_id for k in journal] == [r.task_id for r in whole.rollouts[:kept]]
            for rollout in whole.rollouts[kept:]:
                journal.write(rollout)
        assert path.read_bytes() == whole.data


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_damage_never_cuts_what_was_acknowledged(written: tuple[Written, Path], data: st.DataObject) -> None:
    """Bytes that change by themselves: refused, or harmless within a text; never a line less."""
    whole, path = written
    bad = bytearray(whole.data)
    start = data.draw(st.integers(0, len(bad) - 2), label="start")
    garbage = data.draw(st.binary(min_size=1, max_size=40), label="garbage")
    bad[start : start + len(garbage)] = garbage
    path.write_bytes(bad[: len(whole.data)])
    before = path.read_bytes()
    last = whole.ends[-2]
    refused: StoreError | None = None
    try:
        with Journal(path):
            pass
    except StoreError as error:
        refused = error
    after = path.read_bytes()
    assert after[:last] == before[:last]
    if refused is not None or start + len(garbage) <= last:
        assert after == before
    assert refused is None or refused.line is not None


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 5)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("kill"), st.integers(0, 4000)),
        st.tuples(st.just("newline"), st.just(0)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=60)
@given(steps=_STEPS)
def test_any_order_of_writing_closing_and_dying(
    suffix: str, steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("steps") / f"r.{suffix}"
    expected: dict[RolloutKey, Rollout] = {}
    lines = 0
    journal = Journal(path).__enter__()
    try:
        for number, (step, value) in enumerate(steps):
            rollout = attempt(value, said=str(number))
            if step == "write":
                journal.write(rollout)
                expected[rollout.key] = rollout
                lines += 1
            elif step == "kill":  # within a write: of the line there are the first bytes
                line = format_of(path).encode(to_line(rollout))
                journal.__exit__(None, None, None)
                with path.open("ab") as file:
                    file.write(line[: min(value, len(line) - 2)])
                journal = Journal(path).__enter__()
            else:
                journal.__exit__(None, None, None)
                if step == "newline" and suffix == "jsonl" and lines:
                    os.truncate(path, path.stat().st_size - 1)
                journal = Journal(path).__enter__()
            assert set(journal) == set(expected)
    finally:
        journal.__exit__(None, None, None)
    assert {rollout.key: rollout for rollout in read_rollouts(path)} == expected
    assert len(list(read_rollouts(path, every=True))) == lines


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sigkill_at_random_moments(suffix: str, tmp_path: Path) -> None:
    """A new writer goes on after each kill. Nothing acknowledged is lost, and nothing is there twice."""
    path, count, kills, chance = tmp_path / f"r.{suffix}", 2000, 0, random.Random(5)
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    acknowledged: set[int] = set()
    with subprocess.Popen(
        [sys.executable, "-m", "support.journal_writers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while kills < 22 and len(acknowledged) < count:
            order = {"path": str(path), "count": count, "seed": kills}
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            writer = int(process.stdout.readline())
            for _ in range(chance.randrange(12)):
                acknowledged.add(int(process.stdout.readline()))
            time.sleep(chance.random() * 0.003)
            os.kill(writer, signal.SIGKILL)
            while (line := process.stdout.readline()) != b"killed\n":
                acknowledged.add(int(line))
            kills += 1
            with LastLines(path) as found:
                assert found.lines == len(found.index)
                assert {key(number) for number in acknowledged} <= set(found.index)
        process.stdin.close()
        assert process.wait(30) == 0
    assert kills >= 20
    with Journal(path) as journal:
        assert {key(number) for number in acknowledged} <= set(journal)
        assert len(journal) <= len(acknowledged) + kills  # each kill may leave one that was not said
        assert all(journal.load(found).key == found for found in journal)


_FULL = """
import resource, sys
from support.stored_rollouts import attempt, key
from gym_sdk.errors import StoreError
from gym_sdk.store import Journal

path = sys.argv[1]
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
with Journal(path) as journal:
    number = 0
    while True:
        try:
            journal.write(attempt(number, said=str(number) * 1000))
        except StoreError as error:
            print(error.errno, error)
            break
        number += 1
    before = len(journal)
    try:
        journal.write(attempt(number))
        number += 1
    except StoreError:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.write(attempt(1000))
    print(number)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_real_limit_on_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"r.{suffix}"
    found = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    assert found.returncode == 0, found.stderr
    said, count = found.stdout.splitlines()
    assert said.startswith(f"{errno.EFBIG} {path}: cannot be written: File too large. The ")
    assert "rollouts in it are safe" in said
    keys = [rollout.key for rollout in read_rollouts(path, every=True)]
    assert keys == [key(number) for number in [*range(int(count)), 1000]]


def test_a_full_device(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.symlink_to("/dev/full")
    with Journal(path) as journal:
        with pytest.raises(StoreError, match="No space left on device") as caught:
            journal.write(attempt())
        assert len(journal) == 0
    assert caught.value.errno == errno.ENOSPC


class FaultyDisk:
    """Stands in for `os.write`: short writes, and errors after some bytes."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.write = os.write
        self.failures = 0

    def __call__(self, descriptor: int, data: Any) -> int:
        if self.chance.random() < 0.1:
            self.failures += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(descriptor, bytes(data[: self.chance.randrange(1, len(data) + 1)]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_short_writes_and_errors_within_a_line(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk, written = tmp_path / f"r.{suffix}", FaultyDisk(random.Random(1)), []
    truncate, refused = os.ftruncate, []

    def sometimes_refuse(descriptor: int, length: int) -> None:
        if disk.chance.random() < 0.3:
            refused.append(length)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        truncate(descriptor, length)

    monkeypatch.setattr(os, "write", disk)
    monkeypatch.setattr(os, "ftruncate", sometimes_refuse)
    with Journal(path) as journal:
        for number in range(150):
            try:
                journal.write(attempt(number))
            except StoreError:
                assert key(number) not in journal
            else:
                written.append(attempt(number))
                assert journal.load(key(number)) == attempt(number)
    assert disk.failures > 5
    assert refused
    assert len(written) > 20
    monkeypatch.undo()
    with Journal(path):
        pass
    assert list(read_rollouts(path, every=True)) == written


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_partial_line_is_taken_back_at_once(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / f"r.{suffix}", os.write
    with Journal(path) as journal:
        journal.write(attempt(0))
        before = path.read_bytes()

        def fills_up(descriptor: int, data: Any) -> int:
            if path.stat().st_size > len(before):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, bytes(data[:50]))

        monkeypatch.setattr(os, "write", fills_up)
        with pytest.raises(StoreError) as caught:
            journal.write(attempt(1))
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before


def test_a_frame_whose_length_is_damaged_is_no_torn_tail(tmp_path: Path) -> None:
    """It seems to reach beyond the end of the file; what follows it must not be cut off."""
    path = tmp_path / "r.jsonl.zst"
    with Journal(path) as journal:
        for number in range(3):
            journal.write(attempt(number))
    data = bytearray(path.read_bytes())
    block = 5 + (0 if data[4] & 0x20 else 1) + (1, 2, 4, 8)[data[4] >> 6]
    data[block : block + 3] = (1 | (128 * 1024 - 1) << 3).to_bytes(3, "little")
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"zst:1: the file ends within a zstd frame"):
        Journal(path).__enter__()
    assert path.read_bytes() == data
    assert [damage.line for damage in check(path).damaged] == [1]


def test_a_frame_that_changed_is_found_out(tmp_path: Path) -> None:
    """Its checksum covers the text too, where another letter would go unnoticed in JSONL."""
    path = tmp_path / "r.jsonl.zst"
    with Journal(path) as journal:
        journal.write(attempt(0))
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        data = bytearray(whole)
        data[position] ^= 0x10
        path.write_bytes(data)
        report = check(path)
        assert report.damaged or report.torn_bytes or list(read_rollouts(path)) == [attempt(0)]


def test_an_interrupt_within_a_write_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "r.jsonl", os.write

    def interrupted(descriptor: int, data: Any) -> int:
        write(descriptor, bytes(data[:100]))
        raise KeyboardInterrupt

    with Journal(path) as journal:
        journal.write(attempt(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.write(attempt(1))
        journal.write(attempt(2))
    assert list(read_rollouts(path, every=True)) == [attempt(0), attempt(2)]
