"""`gym-sdk store`, as users call it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stored_rollouts import attempt, failed

from gym_sdk.cli import main
from gym_sdk.store import Journal, read_rollouts


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with Journal("r.jsonl") as journal:
        for rollout in (failed(0), attempt(0), attempt(1, reward=0.0)):
            journal.write(rollout)
    return Path("r.jsonl")


def run(*arguments: str) -> int:
    return main(["store", *arguments])


def test_summary_check_and_repair(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("summary", "r.jsonl") == 0
    assert "r.jsonl: tasks=2  epochs=1  rollouts=2" in capsys.readouterr().out
    assert run("check", "r.jsonl") == 0
    assert "2 rollouts in 3 lines, 0 damaged" in capsys.readouterr().out
    store.write_bytes(b"oops\n" + store.read_bytes() + b'{"id":"ro')
    assert run("summary", "r.jsonl") == 1
    shown = capsys.readouterr().err
    assert "gym-sdk store: r.jsonl:1: not a rollout" in shown
    assert "gym-sdk store repair r.jsonl" in shown
    assert shown.count("\n") == 1
    assert run("check", "r.jsonl") == 1
    shown = capsys.readouterr().out
    assert "line 1 (5 bytes): not a rollout" in shown
    assert "not whole (9 bytes)" in shown
    assert run("repair", "r.jsonl") == 0
    assert "these lines are now in r.jsonl.damaged" in capsys.readouterr().out
    assert Path("r.jsonl.damaged").read_bytes() == b'oops\n{"id":"ro\n'
    assert run("check", "r.jsonl") == 0


def test_merge(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal("s.jsonl") as journal:
        journal.write(attempt(0, said="other"))
    assert run("merge", "r.jsonl", "s.jsonl", "--out", "all.jsonl.zst") == 1
    assert "--prefer" in capsys.readouterr().err
    assert run("merge", "r.jsonl", "s.jsonl", "--out", "all.jsonl.zst", "--prefer", "last") == 0
    assert capsys.readouterr().out == "all.jsonl.zst: 2 rollouts, 0 repeated, 1 replaced\n"
    assert [rollout.output_text for rollout in read_rollouts("all.jsonl.zst")] == ["a", "other"]


def test_export(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    assert run("export", "r.jsonl", "--out", "tables") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tables/rollouts.parquet: 2 rows",
        "tables/sequences.parquet: 2 rows",
    ]
    assert run("export", "r.jsonl", "--out", "hf", "--dataset", "sequences") == 0
    assert capsys.readouterr().out == "hf: 2 sequences\n"
    assert run("export", "missing.jsonl", "--out", "hf2") == 1
    assert "missing.jsonl: cannot be read: No such file or directory" in capsys.readouterr().err


def test_reverify(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("scoring_again.py").write_text(
        "async def half(rollout):\n    return 0.5\n\n"
        "async def broken(rollout):\n    raise RuntimeError('no')\n"
    )
    assert run("reverify", "r.jsonl", "--verifier", "scoring_again:half", "--out", "h.jsonl") == 0
    assert "changed=2  mean_reward=0.5 -> 0.5" in capsys.readouterr().out
    assert run("reverify", "r.jsonl", "--verifier", "scoring_again:broken", "--out", "b.jsonl") == 1
    assert "failed=2" in capsys.readouterr().out
    assert run("reverify", "r.jsonl", "--verifier", "scoring_again", "--out", "c.jsonl") == 1
    assert "module:name" in capsys.readouterr().err
