"""The journal: what is written is there, whoever asks and however the writer ended."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.stored_rollouts import attempt, failed, key

from gym_sdk.errors import StoreError
from gym_sdk.schema import Message, Outcome, Rollout, Task
from gym_sdk.store import Journal, read_rollouts, task_fingerprint

SUFFIXES = ("jsonl", "jsonl.zst")


@pytest.fixture(params=SUFFIXES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "deep" / f"rollouts.{request.param}"


def lines_of(path: Path) -> list[Rollout]:
    return list(read_rollouts(path, every=True))


def test_what_is_written_is_there_by_key_and_in_order(path: Path) -> None:
    written = [attempt(n, index=i, epoch=n % 2) for n in range(3) for i in range(2)]
    with Journal(path) as journal:
        for number, rollout in enumerate(written):
            journal.write(rollout)
            assert len(lines_of(path)) == number + 1  # readable at once, by anybody
        assert journal.load(key(1, 1, 1)) == written[3]
    with Journal(path) as journal:
        assert list(journal) == [rollout.key for rollout in written]
        assert len(journal) == 6
        assert key(2) in journal
        assert journal.outcome(key(2)) is Outcome.COMPLETED
        assert journal.outcome(key(9)) is None
        assert journal.fingerprint(key(9)) is None
        assert journal.load(key(2, 1)) == written[5]
        with pytest.raises(KeyError):
            journal.load(key(9))
    assert list(read_rollouts(path)) == written


def test_the_last_line_of_a_key_counts(path: Path) -> None:
    first, again = failed(0), attempt(0, said="at last")
    with Journal(path) as journal:
        journal.write(first)
        journal.write(attempt(1))
        journal.write(again)
        assert journal.outcome(key(0)) is Outcome.COMPLETED
        assert journal.load(key(0)) == again
    assert lines_of(path) == [first, attempt(1), again]
    assert list(read_rollouts(path)) == [attempt(1), again]
    with Journal(path) as journal:
        assert list(journal) == [key(1), key(0)]
        assert journal.load(key(0)) == again


def test_zstd_files_are_read_by_zstd(tmp_path: Path) -> None:
    tool = shutil.which("zstd")
    if tool is None:
        pytest.skip("the zstd command, which is no Python package, is not installed")
    path = tmp_path / "r.jsonl.zst"
    with Journal(path) as journal:
        for number in range(3):
            journal.write(attempt(number))
    text = subprocess.run([tool, "-dc", path], capture_output=True, check=True).stdout
    assert [json.loads(line)["task"]["id"] for line in text.splitlines()] == ["task-0", "task-1", "task-2"]
    (tmp_path / "whole.jsonl").write_bytes(text)
    subprocess.run([tool, "-q", tmp_path / "whole.jsonl"], check=True)
    with pytest.raises(StoreError, match=r"whole\.jsonl\.zst:1: several lines in one zstd frame; unpack"):
        list(read_rollouts(tmp_path / "whole.jsonl.zst"))


def test_a_second_writer_is_refused_by_name(path: Path) -> None:
    with Journal(path) as journal:
        with pytest.raises(StoreError, match="another Journal in this process has this store open") as caught:
            Journal(path).__enter__()
        assert caught.value.errno == errno.EWOULDBLOCK
        with pytest.raises(StoreError, match="open already"):
            journal.__enter__()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from gym_sdk.store import Journal\nfrom gym_sdk.errors import StoreError\n"
            f"try:\n    Journal({str(path)!r}).__enter__()\nexcept StoreError as e: print(e)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f"process {os.getpid()} (" in found.stdout, found.stderr
        assert "gym-sdk store merge" in found.stdout
    with Journal(path):
        pass


def test_a_file_that_was_replaced_while_it_was_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever locks a file that is no longer the one of that name would write into nowhere."""
    import fcntl

    path.parent.mkdir()
    path.touch()
    replaced = []
    lock = fcntl.flock

    def replacing_once(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if not replaced:
            replaced.append(path.rename(path.with_name("old")))

    monkeypatch.setattr("fcntl.flock", replacing_once)
    with Journal(path) as journal:
        journal.write(attempt())
    assert len(lines_of(path)) == 1
    assert (path.with_name("old")).stat().st_size == 0


def test_a_torn_tail_is_cut_off_and_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(path) as journal:
        journal.write(attempt(0))
        whole = path.stat().st_size
        journal.write(attempt(1))
    os.truncate(path, whole + 60)
    assert list(read_rollouts(path)) == [attempt(0)]
    assert lines_of(path) == [attempt(0)]
    with caplog.at_level(logging.WARNING), Journal(path) as journal:
        assert "last line of 60 bytes" in caplog.text
        assert path.stat().st_size == whole
        assert list(journal) == [key(0)]
        journal.write(attempt(1))
    assert lines_of(path) == [attempt(0), attempt(1)]


def test_a_whole_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Journal(path) as journal:
        journal.write(attempt(0))
    os.truncate(path, path.stat().st_size - 1)
    assert list(read_rollouts(path)) == [attempt(0)]
    with Journal(path) as journal:
        journal.write(attempt(1))
        assert journal.load(key(0)) == attempt(0)
    assert lines_of(path) == [attempt(0), attempt(1)]


def test_damage_in_the_middle_names_file_line_and_the_way_out(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(attempt(0))
        start = path.stat().st_size
        journal.write(attempt(1))
        end = path.stat().st_size
        journal.write(attempt(2))
    with path.open("r+b") as file:
        file.seek((start + end) // 2)
        file.write(b"\x00\xff\x00")
    before = path.read_bytes()
    for use in (lambda: Journal(path).__enter__(), lambda: lines_of(path), lambda: list(read_rollouts(path))):
        with pytest.raises(StoreError, match=rf"{path.name}:2: .*gym-sdk store repair") as caught:
            use()
        assert caught.value.line == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"a text that nobody wants cut off",
        b'{\n "pretty": true\n}',
        b'{"id": "x", "prompt": "no rollout"}',
        b'{"id": "x"}\n',
        b'[{"id": 1}, ',
        b'{"id":"ro_1","task":{"input":"q"}}junk',
        b'{"id":"ro_1",,',
        b'{"id":"ro_1","task":{"input":"q"},"schema_version":99}\n',
    ],
)
def test_files_that_are_no_stores_are_left_alone(tmp_path: Path, content: bytes) -> None:
    for name in ("r.jsonl", "r.jsonl.zst"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=":1: "):
            Journal(tmp_path / name).__enter__()
        assert (tmp_path / name).read_bytes() == content


def test_blank_lines_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n \n")
    with Journal(path) as journal:
        assert len(journal) == 0
        journal.write(attempt(0))
    with path.open("ab") as file:
        file.write(b"\n  \n")
    with Journal(path) as journal:
        journal.write(attempt(1))
    assert lines_of(path) == [attempt(0), attempt(1)]


def test_older_versions_are_read(tmp_path: Path) -> None:
    old = json.loads(attempt(4).model_dump_json())
    for version in (1, 2):
        data = {name: value for name, value in old.items() if name not in ("epoch", "cancellation")}
        path = tmp_path / f"{version}.jsonl"
        path.write_text(json.dumps({**data, "schema_version": version}) + "\n")
        with Journal(path) as journal:
            assert journal.load(key(4)) == attempt(4)
        assert list(read_rollouts(path)) == [attempt(4)]


def test_fingerprints_tell_tasks_apart_however_they_are_written(path: Path) -> None:
    same = [
        Task([Message(role="user", content="q")], id="a"),
        Task([{"role": "user", "content": "q"}], id="b", answer=4),
        Task([{"type": "message", "content": "q", "role": "user", "id": None}], id="c"),
    ]
    others = [
        Task("q", id="d"),
        Task("r", id="e"),
        Task("q", instructions="be kind", id="f"),
        Task([{"role": "system", "content": "q"}], id="g"),
    ]
    assert len({task_fingerprint(task) for task in same}) == 1
    assert len({task_fingerprint(task) for task in [same[0], *others]}) == 5
    with Journal(path) as journal:
        for task in (*same, *others):
            journal.write(attempt(task=task))
            assert journal.fingerprint((task.id, 0, 0)) == task_fingerprint(task)  # type: ignore[arg-type]
    with Journal(path) as journal:
        for task in (*same, *others):
            assert journal.fingerprint((task.id, 0, 0)) == task_fingerprint(task)  # type: ignore[arg-type]


def test_what_json_cannot_say_is_written_all_the_same(path: Path) -> None:
    rollout = attempt(said="x\udcffy", reward=float("inf"))
    rollout.task.metadata["when"] = object()  # type: ignore[index]
    with Journal(path) as journal:
        journal.write(rollout)
        again = journal.load(rollout.key)
    assert again.output_text == "x?y"
    assert again.task.metadata["when"].startswith("<object")
    with Journal(path) as journal:
        assert len(journal) == 1


def test_a_journal_that_is_not_open(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(StoreError, match="not open"):
        journal.write(attempt())
    with journal:
        journal.write(attempt())
    with pytest.raises(StoreError, match="not open"):
        journal.load(key(0))
    with pytest.raises(StoreError, match=r"missing\.jsonl: cannot be read") as caught:
        list(read_rollouts(path.with_name("missing.jsonl")))
    assert caught.value.errno == errno.ENOENT
    (path.parent / "file").touch()
    with pytest.raises(StoreError, match="folder cannot be made"):
        Journal(path.parent / "file" / "r.jsonl").__enter__()
    with pytest.raises(StoreError, match="cannot be opened"):
        Journal(path.parent).__enter__()


def test_the_error_survives_pickling() -> None:
    error = StoreError("cannot be written", path="a/b.jsonl", line=3, errno=errno.ENOSPC)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.line, again.errno) == (
        "a/b.jsonl:3: cannot be written",
        "a/b.jsonl",
        3,
        errno.ENOSPC,
    )
    assert isinstance(again, OSError)


def test_many_threads_write_whole_lines(path: Path) -> None:
    with Journal(path) as journal:

        def write(number: int) -> None:
            for index in range(50):
                journal.write(attempt(number, index=index, tokens=50))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(journal) == 200
        assert journal.load(key(3, 49)) == attempt(3, index=49, tokens=50)
    assert len(lines_of(path)) == 200


def test_a_durable_journal_flushes_before_it_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    flush = os.fdatasync

    def counting(descriptor: int) -> None:
        flush(descriptor)
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fdatasync", counting)
    with Journal(path, durable=True) as journal:
        for number in range(200):
            journal.write(attempt(number))
        journal.sync()
        assert flushed[-1] == path.stat().st_size
        journal.write(attempt(200))
    assert flushed[-1] == path.stat().st_size
    assert len(flushed) < 100
    with Journal(path, durable=True):  # nothing to flush must not keep it waiting
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flush")]


def test_a_disk_that_refuses_to_flush_is_not_asked_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = threading.Event()

    def refuse(descriptor: int) -> None:
        assert not called.is_set()
        called.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(StoreError, match="could not be put on the disk: Input/output error"):
        with Journal(path, durable=True) as journal:
            journal.write(attempt(0))
            assert called.wait(10)
    assert lines_of(path) == [attempt(0)]
