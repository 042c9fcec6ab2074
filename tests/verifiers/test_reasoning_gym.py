from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gym_sdk.environments import load_tasks, reasoning_gym_tasks, save_tasks
from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout, Task
from gym_sdk.verifiers import Verifier, reasoning_gym, run_verifier
from gym_sdk.verifiers.procedural import decode_entry, encode_entry

Make = Callable[..., Rollout]


async def score(rollout: Make, verifier: Verifier, task: Task, text: str) -> float:
    attempt = rollout(text, task.answer, metadata=task.metadata)
    return (await run_verifier(verifier, attempt)).value


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["chain_sum", "knights_knaves", "countdown", "sudoku", "rearc"])
async def test_the_scorer_still_works_after_a_jsonl_round_trip(
    rollout: Make, tmp_path: Any, name: str
) -> None:
    made = reasoning_gym_tasks(name, size=2, seed=3)
    save_tasks(tmp_path / "tasks.jsonl", made)
    loaded = load_tasks(tmp_path / "tasks.jsonl")
    assert loaded == made
    for task in loaded:
        assert await score(rollout, reasoning_gym(name), task, f" {task.answer}\n") == 1.0
        assert await score(rollout, reasoning_gym(), task, "nonsense") < 1.0


@pytest.mark.asyncio
async def test_extract(rollout: Make) -> None:
    (task,) = reasoning_gym_tasks("chain_sum", size=1, seed=1)
    verifier = reasoning_gym("chain_sum", extract=r"The answer is (.*)\.$")
    assert await score(rollout, verifier, task, f"Hm. The answer is {task.answer}.") == 1.0
    assert await score(rollout, verifier, task, f"{task.answer}") == 0.0
    assert await score(rollout, verifier, task, "The answer is 1e6.") == 0.0
    assert await score(rollout, reasoning_gym(extract="x|(y)"), task, "x") == 0.0


@pytest.mark.asyncio
async def test_graphs_by_integer_keys(rollout: Make) -> None:
    (task,) = reasoning_gym_tasks("graph_color", size=1, seed=1)
    task = Task(**json.loads(json.dumps({"input": "q", "metadata": dict(task.metadata)})))
    entry = decode_entry(task.metadata["reasoning_gym"]["entry"])
    colours = entry["metadata"]["possible_answer"]
    assert all(isinstance(key, int) for key in colours)
    assert await score(rollout, reasoning_gym(), task, json.dumps(colours)) == 1.0


@pytest.mark.asyncio
async def test_tasks_without_an_entry(rollout: Make) -> None:
    for metadata in ({}, {"reasoning_gym": 1}, {"reasoning_gym": {"dataset": "chain_sum"}}):
        with pytest.raises(VerifierError, match="task 't1' has no reasoning-gym entry"):
            await run_verifier(reasoning_gym("chain_sum"), rollout("5", "5", metadata=metadata))


def test_bad_names_and_patterns() -> None:
    with pytest.raises(ConfigurationError, match=r"no dataset 'chain_sums'; it has: .*chain_sum"):
        reasoning_gym("chain_sums")
    with pytest.raises(ConfigurationError, match="not a regular expression"):
        reasoning_gym("chain_sum", extract="(")


def test_entries_survive_json() -> None:
    entry = {"a": (1, (2, [3.5, None])), "b": {1: {(1, 2): "x"}}, "c": [True, {"d": {}}], "e": ()}
    assert decode_entry(json.loads(json.dumps(encode_entry(entry)))) == entry
    with pytest.raises(TypeError, match="set has no JSON form"):
        encode_entry({"a": {1, 2}})
