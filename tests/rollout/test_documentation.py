"""The examples of docs/rollouts.md run, and its tables name every value of the closed sets."""

from __future__ import annotations

import ast
import inspect
import re
from enum import StrEnum
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from support.by_hand import said_with
from support.scripted import ScriptedTransport

from gym_sdk import GymClient, Limits, Rollout, Task
from gym_sdk.rollout import DynamicSampling, Schedule, Staleness
from gym_sdk.rollout.signals import stop_on_signals
from gym_sdk.schema import Cancellation, FailureKind, Outcome, Stage, Truncation

pytestmark = pytest.mark.asyncio

TEXT = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


async def correct(rollout: Rollout) -> float:
    return float(rollout.index % 2)


def compiled(example: str) -> CodeType:
    return compile(example, "rollouts.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("example", EXAMPLES)
async def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transport = ScriptedTransport(lambda request: said_with("x", f"step-{len(transport.pushed)}"))
    async with GymClient.over(transport) as client:
        names: dict[str, Any] = {
            "DynamicSampling": DynamicSampling,
            "Limits": Limits,
            "Schedule": Schedule,
            "Staleness": Staleness,
            "client": client,
            "correct": correct,
            "print": lambda *values: None,
            "stop_on_signals": stop_on_signals,
            "tasks": [Task(f"q{n}") for n in range(6)],
        }
        result = eval(compiled(example), names)
        if inspect.isawaitable(result):
            await result


async def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("values", [Outcome, Truncation, Cancellation, Stage, FailureKind])
async def test_tables_are_complete(values: type[StrEnum]) -> None:
    cells = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+)`", " ".join(cells)))
    assert {value.value for value in values} <= named
