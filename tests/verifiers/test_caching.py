from __future__ import annotations

import asyncio
import gc
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.judging import judge_server

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import (
    FunctionCall,
    FunctionCallOutput,
    Message,
    Outcome,
    OutputText,
    Reward,
    Rollout,
    Truncation,
)
from gym_sdk.tokens import CallTokens
from gym_sdk.verifiers import CachedVerifier, Judge, Verifier, cached, exact, run_verifier, verifier_name

pytestmark = pytest.mark.asyncio

Make = Callable[..., Rollout]


class Counting:
    """Scores by length; knows how often it was asked and can be held up."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.calls = 0
        self.running = 0
        self.arrived = anyio.Event()
        self.go = anyio.Event()
        self.go.set()
        self.error: Exception | None = None

    async def __call__(self, rollout: Rollout) -> Reward:
        self.calls += 1
        self.running += 1
        self.arrived.set()
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        return Reward(value=len(rollout.output_text) / 3, components={"calls": self.calls})


@pytest.fixture(params=["memory", "file"])
def remembering(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., CachedVerifier]:
    def make(verifier: Verifier, **options: Any) -> CachedVerifier:
        path = tmp_path / "new folder" / "rewards.sqlite" if request.param == "file" else None
        return cached(verifier, path=path, version="1", **options)

    return make


Remembering = Callable[..., CachedVerifier]


async def test_equal_rollouts_are_scored_once(rollout: Make, remembering: Remembering) -> None:
    counting = Counting()
    verifier = remembering(counting)
    assert verifier_name(verifier) == "cached(counting)"
    first = await run_verifier(verifier, rollout("yes"))
    assert await run_verifier(verifier, rollout("yes")) == first == Reward(value=1.0, components={"calls": 1})
    assert (await run_verifier(verifier, rollout("ye"))).value == 2 / 3
    assert (counting.calls, verifier.hits, verifier.misses) == (2, 1, 2)


def talk(**changes: Any) -> Rollout:
    """Return a rollout with a tool call and everything that a key might take in."""
    call_id = changes.get("call_id", "call_1")
    items = [
        Message(role="user", content=changes.get("question", "q")),
        FunctionCall(call_id=call_id, name="look", arguments=changes.get("arguments", "{}"), id="fc_1"),
        FunctionCallOutput(call_id=changes.get("output_of", call_id), output=changes.get("seen", "cat")),
        Message(
            role="assistant",
            id=changes.get("item_id", "msg_1"),
            status=changes.get("status", "completed"),
            content=[OutputText(text=changes.get("text", "A cat"), logprobs=changes.get("logprobs"))],
        ),
    ]
    calls = [
        {"response_id": changes.get("response_id", "resp_1"), "first_item": 1, "end_item": 2},
        {"response_id": "resp_2", "first_item": changes.get("first_item", 3), "end_item": 4},
    ]
    made = Rollout.model_validate(
        {
            "id": changes.get("id", "r1"),
            "index": changes.get("index", 0),
            "task": {
                "input": "q",
                "id": changes.get("task_id", "t1"),
                "answer": changes.get("answer", {"b": 1, "a": [2]}),
                "metadata": changes.get("metadata", {"level": 3}),
                "instructions": changes.get("instructions"),
                "settings": changes.get("settings", {}),
            },
            "items": items,
            "input_items": 1,
            "model_calls": calls,
            "outcome": changes.get("outcome", Outcome.COMPLETED),
            "truncation": changes.get("truncation"),
            "timing": {"started_at": changes.get("started_at", 0.0)},
        }
    )
    if "tokens" in changes:
        made.model_calls[0].tokens = changes["tokens"]
    return made


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"id": "r2", "index": 5, "task_id": "t2", "started_at": 9.0}, True),
        ({"call_id": "call_9", "item_id": "msg_9", "response_id": "resp_9", "status": None}, True),
        ({"tokens": CallTokens([1], [2], [-0.5]), "logprobs": [1], "settings": {"temperature": 0.1}}, True),
        ({"answer": {"a": [2], "b": 1}}, True),
        ({"answer": {"a": [2], "b": 1.5}}, False),
        ({"answer": None}, False),
        ({"metadata": {}}, False),
        ({"instructions": "Be kind."}, False),
        ({"question": "p"}, False),
        ({"text": "a cat"}, False),
        ({"arguments": '{"x":1}'}, False),
        ({"seen": "dog"}, False),
        ({"output_of": "call_2"}, False),
        ({"first_item": 2}, False),
        ({"outcome": Outcome.TRUNCATED, "truncation": Truncation.TOKENS}, False),
    ],
)
async def test_what_is_equal(changes: dict[str, Any], same: bool) -> None:
    verifier = cached(Counting())
    await verifier(talk())
    await verifier(talk(**changes))
    assert verifier.hits == same


async def test_verifiers_and_versions_share_a_file(rollout: Make, tmp_path: Path) -> None:
    path = tmp_path / "rewards.sqlite"
    counting, other = Counting(), exact()
    for verifier, version, misses in (
        (counting, "1", 1),
        (counting, "1", 0),
        (counting, "2", 1),
        (other, "1", 1),
        (counting, "1", 0),
    ):
        remembering = cached(verifier, path=path, version=version)
        await remembering(rollout("yes", "yes"))
        assert remembering.misses == misses


async def test_the_rubrics_of_a_judge_have_entries_of_their_own(rollout: Make, tmp_path: Path) -> None:
    async with judge_server(lambda body: "Score: 10" if "kind" in str(body) else "Score: 0") as server:
        judge = Judge(server.url, "j")
        for rubric, value in (("Is it kind?", 1.0), ("Is it short?", 0.0), ("Is it kind?", 1.0)):
            verifier = cached(judge.verifier(rubric), path=tmp_path / "rewards", version="1")
            assert (await run_verifier(verifier, rollout("x"))).value == value
        assert len(server.bodies) == 2


async def test_equal_rollouts_at_the_same_time(rollout: Make, remembering: Remembering) -> None:
    counting = Counting()
    counting.go = anyio.Event()
    verifier = remembering(counting)
    values: list[float] = []

    async def score() -> None:
        values.append((await run_verifier(verifier, rollout("yes"))).value)

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(score)
        await counting.arrived.wait()
        counting.go.set()
    assert values == [1.0] * 50
    assert (counting.calls, verifier.hits) == (1, 49)


async def test_another_takes_over_when_the_one_that_computes_is_cancelled(
    rollout: Make, remembering: Remembering
) -> None:
    counting = Counting()
    counting.go = anyio.Event()
    verifier = remembering(counting)
    attempts = [asyncio.create_task(run_verifier(verifier, rollout("yes"))) for _ in range(5)]
    for first in attempts[:2]:
        await counting.arrived.wait()
        counting.arrived = anyio.Event()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    attempts[4].cancel()  # one that only waits
    await counting.arrived.wait()
    counting.go.set()
    assert [(await attempt).value for attempt in attempts[2:4]] == [1.0, 1.0]
    assert attempts[4].cancelled()
    assert (counting.calls, verifier.hits) == (3, 1)
    assert verifier._flights == {}


async def test_failures_are_not_remembered(rollout: Make, remembering: Remembering) -> None:
    counting = Counting()
    counting.go = anyio.Event()
    counting.error = KeyError("k")
    verifier = remembering(counting)
    attempts = [asyncio.create_task(run_verifier(verifier, rollout("yes"))) for _ in range(3)]
    await counting.arrived.wait()
    counting.go.set()
    errors = await asyncio.gather(*attempts, return_exceptions=True)
    assert {str(error) for error in errors} == {"verifier counting raised KeyError: 'k'"}
    assert len({id(error) for error in errors}) == 3
    assert counting.calls == 1
    counting.error = None
    assert (await run_verifier(verifier, rollout("yes"))).value == 1.0
    assert verifier._flights == {}


async def test_only_so_many_are_kept(rollout: Make, remembering: Remembering) -> None:
    counting = Counting()
    verifier = remembering(counting, max_entries=3)
    for text in ("a", "bb", "ccc", "dddd", "bb", "a", "dddd"):
        await verifier(rollout(text))
    assert counting.calls == 5  # "a" was forgotten once


async def test_memory_forgets_what_was_not_used_for_longest(rollout: Make) -> None:
    verifier = cached(Counting(), max_entries=2)
    for text in ("a", "b", "a", "c", "a"):
        await verifier(rollout(text))
    assert verifier.hits == 2


async def test_event_loops_of_several_threads(rollout: Make, remembering: Remembering) -> None:
    async def verify(rollout: Rollout) -> float:
        await asyncio.sleep(0.001)
        return 1.0

    verifier = remembering(verify)

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for i in range(40):
                group.start_soon(run_verifier, verifier, rollout(str(i % 10)))

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, many()) for _ in range(4)))
    assert verifier.hits + verifier.misses == 160
    assert verifier.misses <= 40


async def test_several_processes_share_a_file(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from gym_sdk.schema import Reward
from gym_sdk.verifiers.rewards_file import RewardsFile
from pathlib import Path

async def main():
    rewards = RewardsFile(Path(sys.argv[1]), 10_000)
    for i in range(60):
        await rewards.put(b"%d" % (i * int(sys.argv[2])), Reward(value=i * int(sys.argv[2])))

asyncio.run(main())
"""
    path = tmp_path / "rewards.sqlite"
    command = [sys.executable, "-W", "error", "-c", script, str(path)]
    writers = [
        subprocess.Popen([*command, str(k)], stderr=subprocess.PIPE, env={**os.environ}) for k in (1, 2, 3)
    ]
    for writer in writers:
        _, stderr = await asyncio.to_thread(writer.communicate)
        assert (writer.returncode, stderr) == (0, b"")  # no warning either: nothing failed
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT key, reward FROM rewards").fetchall()
    connection.close()
    stored = {int(key): Reward.model_validate_json(reward).value for key, reward in rows}
    assert stored == {n: float(n) for k in (1, 2, 3) for n in range(0, 60 * k, k)}


async def test_a_file_after_a_fork(rollout: Make, tmp_path: Path) -> None:
    script = """
import asyncio, os, sys
from pathlib import Path
from gym_sdk.schema import Reward
from gym_sdk.verifiers.rewards_file import RewardsFile

rewards = RewardsFile(Path(sys.argv[1]), 10)
asyncio.run(rewards.put(b"parent", Reward(value=1.0)))
child = os.fork()
assert asyncio.run(rewards.get(b"parent")) == Reward(value=1.0)
asyncio.run(rewards.put(b"%d" % child, Reward(value=2.0)))
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert asyncio.run(rewards.get(b"0")) == Reward(value=2.0)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "rewards.sqlite")]
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


async def test_a_file_that_fails_costs_verifications_only(
    rollout: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rewards.sqlite"
    counting = Counting()
    verifier = cached(counting, path=path, version="1")
    await verifier(rollout("yes"))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE rewards SET reward = '{'")
    connection.close()
    with caplog.at_level(logging.WARNING):
        assert (await verifier(rollout("yes"))).value == 1.0
        assert (await verifier(rollout("yes"))).value == 1.0  # written anew
    assert len(caplog.records) == 1
    assert counting.calls == 2
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE rewards")
    connection.close()
    with caplog.at_level(logging.WARNING):
        assert (await verifier(rollout("yes"))).value == 1.0
    assert "no such table" in caplog.records[-1].message


async def test_a_file_is_closed_with_its_verifier(rollout: Make, tmp_path: Path) -> None:
    path = tmp_path / "rewards.sqlite"
    verifier = cached(Counting(), path=path, version="1")
    await verifier(rollout("yes"))
    assert path.with_name("rewards.sqlite-wal").exists()
    del verifier
    for _ in range(100):
        gc.collect()
        if not path.with_name("rewards.sqlite-wal").exists():
            return
        await asyncio.sleep(0.02)
    pytest.fail("the connection is still open")


async def test_tasks_without_a_json_form(rollout: Make) -> None:
    verifier = cached(Counting())
    await verifier(rollout("x", metadata={"path": Path("/a"), "set": {1}}))
    with pytest.raises(VerifierError, match="task 't1' has no JSON form") as caught:
        await run_verifier(verifier, rollout("x", object()))
    assert caught.value.verifier == "cached(counting)"
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(VerifierError, match="no JSON form"):
        await run_verifier(verifier, rollout("x", circle))


async def test_mistakes_are_told_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match='version="1"'):
        cached(exact(), path=tmp_path / "rewards.sqlite")
    with pytest.raises(ConfigurationError, match="max_entries must be at least 1"):
        cached(exact(), max_entries=0)
    with pytest.raises(ConfigurationError, match="cannot be used as a cache of rewards"):
        cached(exact(), path=tmp_path, version="1")
    (tmp_path / "text").write_text("not a database, but long enough to be looked at " * 50)
    with pytest.raises(ConfigurationError, match="not a database"):
        cached(exact(), path=tmp_path / "text", version="1")
