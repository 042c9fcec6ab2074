"""Tools that return too much, hang, or break: the model is told, and the rollout goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.collecting import check, collected, leaving_nothing, questions
from support.faulty_policy import serving

from gym_sdk import Deadlines, GymClient, Limits, Rollout, tool
from gym_sdk.rollout import Collection
from gym_sdk.schema import FunctionCallOutput

pytestmark = pytest.mark.asyncio

BAD = 1
"""The question for which the tools here misbehave."""


def verifier_of(said: str) -> Callable[[Rollout], Any]:
    """Return a verifier that wants the tool's output in the answer: `said` where the tool misbehaves."""

    async def told(rollout: Rollout) -> float:
        expected = said if rollout.task.answer == 7 * BAD else str(rollout.task.answer)
        return float(rollout.output_text == f"answer {expected}"[:47])

    return told


async def used(function: Callable[..., Any], store: Path, said: str, **options: Any) -> Collection:
    """Collect with a tool; all rollouts have to come to their end, told what they should be told."""
    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        async with asyncio.timeout(60):
            tools = [tool(name="look")(function)]
            verifier = verifier_of(said)
            collection = await collected(client, store, tools=tools, verifier=verifier, **options)
    assert not collection.failures
    return collection


def outputs(collection: Collection) -> list[str]:
    found = [
        item.output
        for rollout in collection.rollouts
        for item in rollout.items
        if isinstance(item, FunctionCallOutput) and rollout.task.answer == 7 * BAD
    ]
    assert all(isinstance(output, str) for output in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["text", "list"])
async def test_100_mb(kind: str, tmp_path: Path) -> None:
    """The model reads the head of it; neither the server nor the store gets the rest."""
    huge: Any = "x" * 100_000_000 if kind == "text" else ["x" * 99] * 1_000_000

    async def look(number: int) -> Any:
        """Look something up."""
        return huge if number == BAD else str(number * 7)

    store = tmp_path / "r.jsonl"
    collection = await used(look, store, "x" * 100 if kind == "text" else '["' + "x" * 100)
    for output in outputs(collection):
        assert len(output) < 200_200
        assert "output cut" in output
    assert store.stat().st_size < 2_000_000


async def test_as_much_as_one_likes_without_a_limit(tmp_path: Path) -> None:
    async def look(number: int) -> str:
        """Look something up."""
        return "x" * 10_000_000 if number == BAD else str(number * 7)

    limits = Limits(tool_output_chars=None)
    collection = await used(look, tmp_path / "r.jsonl", "x" * 100, limits=limits, count=3)
    assert {len(output) for output in outputs(collection)} == {10_000_000}


async def test_hanging(tmp_path: Path) -> None:
    async def look(number: int) -> str:
        """Look something up."""
        if number == BAD:
            await asyncio.Event().wait()
        return str(number * 7)

    said = "Error: look did not finish within 0.2 s"
    await used(look, tmp_path / "r.jsonl", said, deadlines=Deadlines(tool_s=0.2))


async def test_hanging_on_when_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_sdk.deadline._CANCEL_AGAIN_S", 0.05)

    async def look(number: int) -> str:
        """Look something up."""
        for _ in range(3 if number == BAD else 0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue
        if number == BAD:
            await asyncio.Event().wait()
        return str(number * 7)

    said = "Error: look did not finish within 0.2 s"
    await used(look, tmp_path / "r.jsonl", said, deadlines=Deadlines(tool_s=0.2))


async def test_hanging_in_a_thread(tmp_path: Path) -> None:
    released = threading.Event()

    def look(number: int) -> str:
        """Look something up."""
        if number == BAD:
            released.wait(60)
        return str(number * 7)

    said = "Error: look did not finish within 0.2 s"
    try:
        await used(look, tmp_path / "r.jsonl", said, deadlines=Deadlines(tool_s=0.2))
    finally:
        released.set()


def exits() -> str:
    sys.exit(3)


def cancels() -> str:
    raise asyncio.CancelledError


def holds_itself() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def recurses() -> str:
    return recurses()


def groups() -> str:
    raise ExceptionGroup("many", [ValueError("a"), KeyError("b")])


BREAKS: dict[str, tuple[Callable[[], Any], str]] = {
    "exits": (exits, "Error: look failed: SystemExit: 3"),
    "cancels": (cancels, "Error: look failed: "),
    "holds itself": (holds_itself, "Error: look returned a list, which cann"),
    "no JSON": (object, "Error: look returned a object, which ca"),
    "recurses": (recurses, "Error: look failed: RecursionError: "),
    "groups": (groups, "Error: look failed: ExceptionGroup: ma"),
    "half a character": (lambda: "\udcff", "?"),
    "no text at all": (lambda: None, ""),
    "zeros": (lambda: "\x00\x1b[2J", "\x00\x1b[2J"),
}


def breaking() -> Iterator[Any]:
    for name in BREAKS:
        for plain in (False, True):
            yield pytest.param(name, plain, id=f"{name}, in a {'thread' if plain else 'coroutine'}")


@pytest.mark.parametrize(("name", "plain"), list(breaking()))
async def test_breaking(name: str, plain: bool, tmp_path: Path) -> None:
    function, said = BREAKS[name]

    def look(number: int) -> Any:
        """Look something up."""
        return function() if number == BAD else str(number * 7)

    async def look_async(number: int) -> Any:
        """Look something up."""
        return look(number)

    async def begins(rollout: Rollout) -> float:
        expected = said if rollout.task.answer == 7 * BAD else str(rollout.task.answer)
        return float(rollout.output_text.startswith(f"answer {expected}"))

    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        async with asyncio.timeout(60):
            tools = [tool(name="look")(look if plain else look_async)]
            collection = await collected(client, tmp_path / "r.jsonl", tools=tools, verifier=begins)
    assert not collection.failures


async def test_closing_what_is_not_its_own(tmp_path: Path) -> None:
    """Standard input is of no use to the event loop, so a tool that closes it harms nobody."""
    saved = os.dup(0)

    def look(number: int) -> str:
        """Look something up."""
        if number == BAD:
            os.close(0)
            os.dup2(saved, 0)
        return str(number * 7)

    try:
        await used(look, tmp_path / "r.jsonl", "7", limits=Limits(concurrency=1))
    finally:
        os.dup2(saved, 0)
        os.close(saved)


async def test_a_call_of_no_tool(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"

    async def begins(rollout: Rollout) -> float:
        return float(rollout.output_text.startswith("answer Error: there is no tool 'look'"))

    async with serving() as policy, leaving_nothing(policy), GymClient(policy.url) as client:
        collection = await client.collect(questions(4), group_size=2, verifier=begins, store=store)
    check(collection.rollouts, store, count=4, group_size=2)
    assert not collection.failures
