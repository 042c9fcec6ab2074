"""The command line, run as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gym_sdk.cli import main
from gym_sdk.rollout import read_rollouts


def gym_sdk(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gym_sdk.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=110,
    )


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for command in ("demo", "serve", "rollout", "store", "tiny"):
        assert command in shown


def test_errors_are_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"input": "1 + 1"}\n{"input": \n')
    assert main(["rollout", str(tmp_path / "tasks.jsonl"), "--url", "http://127.0.0.1:9/v1"]) == 1
    shown = capsys.readouterr().err
    assert "tasks.jsonl:2" in shown
    assert shown.count("\n") == 1
    (tmp_path / "tasks.jsonl").write_text('{"input": "1 + 1"}\n')
    command = ["rollout", str(tmp_path / "tasks.jsonl"), "--url", "http://127.0.0.1:9/v1"]
    assert main([*command, "--tool", "no_colon"]) == 1
    assert "module:name" in capsys.readouterr().err
    assert main([*command, "--tool", "no_such_module:tool"]) == 1
    assert "no_such_module" in capsys.readouterr().err
    assert main(["tiny", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_serving_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = gym_sdk("serve", "no/such/model", cwd=tmp_path)
    assert done.returncode == 1
    assert "no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_rollouts_of_a_file_of_tasks(tmp_path: Path, untrained_policy: Path) -> None:
    rows = [{"input": f"{n} + 1 =", "answer": n + 1, "id": f"sum-{n}"} for n in range(3)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scoring.py").write_text(
        "from gym_sdk import tool\n\n"
        "def short(rollout):\n    return len(rollout.output_text) < 1000\n\n"
        "@tool\nasync def now() -> str:\n    return 'noon'\n"
    )
    done = gym_sdk(
        *("rollout", "tasks.jsonl", "--model", str(untrained_policy), "--out", "out.jsonl"),
        *("--verifier", "scoring:short", "--tool", "scoring:now"),
        *("--group-size", "2", "--max-output-tokens", "8", "--seed", "1", "--track", "jsonl:metrics.jsonl"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "mean_reward=1" in done.stdout
    assert "outcomes/failed" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert len(list(read_rollouts(tmp_path / "out.jsonl"))) == 6
