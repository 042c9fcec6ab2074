from __future__ import annotations

import itertools
from typing import Any

import pytest

from backends.tiny.families.lockers import LockersMix, LockersTrace, ask_lockers, lockers_trace
from gym_sdk.environments import load_tasks, lockers, lockers_tasks, save_tasks
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Message, ModelCall, Rollout, Task, Timing
from gym_sdk.verifiers import run_verifier


def trail_of(task: Task) -> list[tuple[str, str]]:
    """Return the task's lockers and digits, in the trail's order."""
    return [(name, note[0]) for name, note in task.metadata["lockers"].items()]


async def open_all(task: Task, names: str) -> list[str]:
    environment = lockers()
    state = await environment.start(task)
    (tool,) = environment.tools_for(state)
    return [await tool.run(f'{{"locker": "{name}"}}') for name in names]


async def reward(task: Task, text: str) -> float:
    rollout = Rollout(
        id="r",
        task=task,
        items=[Message(role="assistant", content=text)],
        model_calls=[ModelCall(response_id="resp", first_item=0, end_item=1)],
        timing=Timing(started_at=0.0),
    )
    verifier = lockers().verifier
    assert verifier is not None
    return (await run_verifier(verifier, rollout)).value


@pytest.mark.asyncio
async def test_the_trail_leads_to_the_code(tmp_path: Any) -> None:
    save_tasks(tmp_path / "t.jsonl", lockers_tasks(size=30, seed=1))
    for task in load_tasks(tmp_path / "t.jsonl"):
        name = str(task.input).removeprefix("Follow the lockers from ")[0]
        environment = lockers()
        (tool,) = environment.tools_for(await environment.start(task))
        code = ""
        while True:
            digit, _, rest = (await tool.run(f'{{"locker": "{name}"}}')).partition(", ")
            code += digit
            if rest == "last":
                break
            name = rest.removeprefix("next ")
        assert code == task.answer
        assert 2 <= len(code) <= 4
        assert await reward(task, f"The code is {code}.") == 1.0
        for text in ("", code, f"The code is {code}", f"The code is {code[:-1]}.", f"So the code is {code}."):
            assert await reward(task, text) == 0.0, text


@pytest.mark.asyncio
async def test_a_locker_opens_once_in_each_rollout() -> None:
    (task,) = lockers_tasks(size=1, seed=0, min_length=3, max_length=3)
    first = str(task.input).removeprefix("Follow the lockers from ")[0]
    beside = next(name for name in "abcd" if name not in task.metadata["lockers"])
    note = task.metadata["lockers"][first]
    assert await open_all(task, first + first + beside + beside) == [note, "locked", "empty", "locked"]
    # another rollout finds all of them closed, and the task as it was
    assert await open_all(task, first) == [note]


def test_the_prompt_tells_nothing_but_the_beginning() -> None:
    tasks = lockers_tasks(size=400, seed=0)
    assert len({task.input for task in tasks}) == 26
    assert len({task.answer for task in tasks}) > 200
    for task in tasks:
        assert str(task.input) == ask_lockers(next(iter(task.metadata["lockers"])))


def test_tasks_are_stable_and_differ_by_seed_and_split() -> None:
    tasks = lockers_tasks(size=50, seed=3)
    assert tasks == lockers_tasks(size=50, seed=3)
    assert tasks[:20] == lockers_tasks(size=20, seed=3)
    assert tasks[0].id == "lockers-train-3-0"
    others = (lockers_tasks(size=50, seed=4), lockers_tasks(size=50, seed=3, split="held_out"))
    for other in others:
        assert [task.answer for task in other] != [task.answer for task in tasks]
        assert not {task.id for task in other} & {task.id for task in tasks}


@pytest.mark.asyncio
async def test_the_tiny_policys_traces_are_rollouts_of_this_environment() -> None:
    environment = lockers()
    for task in lockers_tasks(size=20, seed=2):
        state = await environment.start(task)
        (tool,) = environment.tools_for(state)
        assert LockersMix.tool is not None
        known = LockersMix.tool["function"]
        assert tool.name == known["name"]
        assert list(tool.schema.parameters["properties"]) == list(known["parameters"]["properties"])
        for kind in LockersTrace:
            state = await environment.start(task)
            (tool,) = environment.tools_for(state)
            messages = lockers_trace(kind, trail_of(task))
            assert messages[0]["content"] == task.input
            for before, after in itertools.pairwise(messages):
                if after["role"] == "tool":
                    arguments = before["tool_calls"][0]["function"]["arguments"]
                    assert await tool.run(arguments) == after["content"]
            assert await reward(task, messages[-1]["content"]) == float(kind is LockersTrace.FOLLOW)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "test"},
        {"min_length": 0},
        {"min_length": 3, "max_length": 2},
        {"max_length": 27},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        lockers_tasks(size=1, seed=0, **options)
