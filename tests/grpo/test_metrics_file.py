"""`metrics.jsonl` survives kills and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gym_sdk.errors import DatasetError
from gym_sdk.grpo.metrics import MetricsFile


def test_later_lines_and_a_cut_line_go_on_resume(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    assert file.read() == []
    file.keep_until(3)
    for step in (1, 2, 3):
        file.append(step, {"reward_mean": step / 10})
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "rew')
    assert [record["step"] for record in file.read()] == [1, 2, 3]
    file.keep_until(2)
    file.append(3, {"reward_mean": 0.9})
    assert file.read()[-1] == {"step": 3, "reward_mean": 0.9}
    assert len(file.read()) == 3


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"reward": 1}'])
def test_a_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(DatasetError, match=r"metrics\.jsonl:2: not"):
        MetricsFile(path).read()
