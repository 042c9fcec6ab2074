"""Parquet files and Hugging Face datasets of stored rollouts."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stored_rollouts import attempt, failed
from support.token_calls import call_lists

from gym_sdk.errors import ConfigurationError, StoreError
from gym_sdk.schema import Group, ModelCall, Rollout
from gym_sdk.store import Journal, to_dataset, to_parquet
from gym_sdk.tokens import CallTokens

parquet = pytest.importorskip("pyarrow.parquet")

ROLLOUTS = [
    failed(0),
    attempt(0, index=1, reward=0.0, metrics={"turns": 1.0}),
    attempt(0, index=2, reward_components={"format": 0.5, "answer": 0.5}),
    attempt(0, epoch=1),
    attempt(0),
    attempt(1, reward=0.25, tokens=0),
]


@pytest.fixture(params=["jsonl", "jsonl.zst"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"r.{request.param}"
    with Journal(path) as journal:
        for rollout in ROLLOUTS:
            journal.write(rollout)
    return path


def test_two_tables(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = to_parquet(store, tmp_path / "out")
    assert (report.rollout_rows, report.sequence_rows, report.without_tokens) == (5, 4, 1)
    assert "1 rollouts have no training rows" in caplog.text
    rows = parquet.read_table(report.rollouts).to_pylist()
    assert [(row["task_id"], row["epoch"], row["index"]) for row in rows] == [r.key for r in ROLLOUTS[1:]]
    first = rows[0]
    assert json.loads(first["task_input"]) == "question 0"
    assert json.loads(first["task_answer"]) == {"n": 0}
    assert json.loads(first["task_metadata"]) == {"tags": ["x"]}
    assert [item["role"] for item in json.loads(first["items"])] == ["user", "assistant"]
    assert first["metrics"] == [{"name": "turns", "value": 1.0}]
    assert first["started_at"] == datetime.fromtimestamp(1_000_000.5, UTC)
    assert (first["turns"], first["generated_tokens"], first["output_text"]) == (1, 3, "a")
    assert [row["reward"] for row in rows] == [0.0, 1.0, 1.0, 1.0, 0.25]
    assert rows[1]["reward_components"][0] == {"name": "format", "value": 0.5}
    assert rows[4]["generated_tokens"] is None
    sequences = parquet.read_table(report.sequences).to_pylist()
    group = Group(task=ROLLOUTS[4].task, rollouts=[ROLLOUTS[4], ROLLOUTS[1], ROLLOUTS[2]])
    expected = {row.rollout_id: row for row in group.sequences()}
    for row in sequences:
        if row["epoch"] == 0:
            sequence = expected.pop(row["rollout_id"])
            assert row["token_ids"] == sequence.token_ids
            assert row["loss_mask"] == sequence.loss_mask
            assert row["log_probs"] == sequence.log_probs
            assert row["advantage"] == pytest.approx(sequence.advantage)
            assert row["weight_versions"] == [{"version": "3", "start": 3, "end": 6}]
        else:
            assert row["advantage"] == 0.0  # alone in its epoch
    assert not expected


def test_failures_are_columns_and_have_no_reward(tmp_path: Path) -> None:
    report = to_parquet([attempt(0), failed(0)], tmp_path)  # the last of a key counts
    (row,) = parquet.read_table(report.rollouts).to_pylist()
    assert row["reward"] is None
    assert (row["outcome"], row["failure_where"], row["failure_error"]) == (
        "failed",
        "model_call",
        "ConnectionError",
    )
    assert parquet.read_table(report.sequences).num_rows == 0


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_sdk.store.tables._ROW_GROUP_BYTES", 2000)
    report = to_parquet([attempt(n, tokens=50) for n in range(10)], tmp_path)
    for path, groups in ((report.rollouts, 3), (report.sequences, 4)):
        metadata = parquet.ParquetFile(path).metadata
        assert metadata.num_rows == 10
        assert metadata.num_row_groups >= groups


@settings(deadline=None, max_examples=25)
@given(calls=call_lists(), reward=st.floats(allow_nan=False, allow_infinity=False))
def test_tokens_are_exact(
    calls: list[CallTokens], reward: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rollout = attempt(0, reward=reward)
    rollout.model_calls = [
        ModelCall(response_id=f"{n}", first_item=1, end_item=2, tokens=tokens)
        for n, tokens in enumerate(calls)
    ]
    report = to_parquet([rollout], tmp_path_factory.mktemp("exact"))
    rows = parquet.read_table(report.sequences).to_pylist()
    assert [(row["token_ids"], row["loss_mask"], row["forked"], row["abandoned"]) for row in rows] == [
        (row.token_ids, row.loss_mask, row.forked, row.abandoned) for row in rollout.sequences()
    ]
    assert all(row["reward"] == reward for row in rows)


def test_datasets(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    for table, rows in (("rollouts", 5), ("sequences", 4)):
        dataset = to_dataset(store, table)
        out = tmp_path / "deep" / table
        saved = to_dataset(store, table, out=out)
        assert dataset.num_rows == saved.num_rows == rows
        assert dataset.features == saved.features == datasets.load_from_disk(out).features
        assert list(dataset) == list(saved)
        assert list(out.parent.iterdir()) == [out]
        with pytest.raises(StoreError, match="exists already"):
            to_dataset(store, table, out=out)
        del saved
        (tmp_path / "deep" / table).rename(tmp_path / table)
    assert capfd.readouterr().err == ""
    assert to_dataset([], "rollouts").num_rows == 0
    with pytest.raises(StoreError, match="no rows"):
        to_dataset([], out=tmp_path / "none")
    assert next(iter(to_dataset(ROLLOUTS)))["loss_mask"] == [0, 0, 0, 1, 1, 1]


def test_without_the_extra(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "datasets", "backports"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("gym_sdk.store.tables", "gym_sdk.store.zstd_frames"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    rollouts: list[Rollout] = []
    for use in (
        lambda: to_parquet(rollouts, tmp_path / "out"),
        lambda: to_dataset(rollouts),
        lambda: Journal(tmp_path / "new.jsonl.zst"),
    ):
        with pytest.raises(ConfigurationError, match=r'pip install "gym-sdk\[store\]"'):
            use()
