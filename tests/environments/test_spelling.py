from __future__ import annotations

import functools
from typing import Any

import pytest

from backends.tiny.families.spelling import SpellingTrace, spelling_trace
from gym_sdk.environments import load_tasks, save_tasks, spelling, spelling_tasks
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Message, ModelCall, Rollout, Task, Timing
from gym_sdk.verifiers import Verifier, run_verifier


async def reward(task: Task, text: str) -> float:
    rollout = Rollout(
        id="r",
        task=task,
        items=[Message(role="assistant", content=text)],
        model_calls=[ModelCall(response_id="resp", first_item=0, end_item=1)],
        timing=Timing(started_at=0.0),
    )
    return (await run_verifier(the_verifier(), rollout)).value


@functools.cache  # it reads its list of words anew each time that it is made
def the_verifier() -> Verifier:
    verifier = spelling().verifier
    assert verifier is not None
    return verifier


@pytest.mark.asyncio
async def test_each_letter_in_its_place_counts(tmp_path: Any) -> None:
    save_tasks(tmp_path / "t.jsonl", spelling_tasks(size=40, seed=1))
    for task in load_tasks(tmp_path / "t.jsonl"):
        backward = task.answer
        assert await reward(task, backward) == 1.0
        assert await reward(task, "") == 0.0
        assert await reward(task, "?" * len(backward)) == 0.0
        for known in range(1, len(backward)):
            partial = backward[:known] + "?" * (len(backward) - known)
            assert await reward(task, partial) == pytest.approx(known / len(backward))


@pytest.mark.asyncio
async def test_the_tiny_policys_traces_are_about_these_tasks() -> None:
    rewards: dict[str, list[float]] = {kind: [] for kind in SpellingTrace}
    for task in spelling_tasks(size=60, seed=2):
        for kind in SpellingTrace:
            question, answer = spelling_trace(kind, task.answer[::-1])
            assert question["content"] == task.input
            rewards[kind].append(await reward(task, answer["content"]))
    means = {kind: sum(values) / len(values) for kind, values in rewards.items()}
    assert means["backward"] == 1.0
    assert 0.5 <= means["half"] < 0.7
    assert means["forward"] < 0.25


def test_splits_never_share_a_word() -> None:
    train = {task.input for seed in (0, 1) for task in spelling_tasks(size=500, seed=seed)}
    held_out = [task.input for task in spelling_tasks(size=256, seed=0, split="held_out")]
    assert not train & set(held_out)
    assert len(set(held_out)) > 200
    assert len(train) > 900


def test_tasks_are_stable() -> None:
    tasks = spelling_tasks(size=30, seed=3)
    assert tasks == spelling_tasks(size=30, seed=3)
    assert tasks[0].id == "spell_backward-train-3-0"
    assert all(3 <= len(task.answer) <= 6 for task in tasks)
    assert all(
        len(task.answer) == 5 for task in spelling_tasks(size=9, seed=0, min_word_len=5, max_word_len=5)
    )


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="held_out"):
        spelling_tasks(size=1, seed=0, split="test")  # type: ignore[arg-type]
