"""Scoring stored rollouts with another verifier."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path

import anyio
import pytest
from support.stored_rollouts import attempt, failed, key

from gym_sdk.errors import ConfigurationError, StoreError
from gym_sdk.schema import Cancellation, FailureKind, Outcome, Reward, Rollout, Task, Truncation
from gym_sdk.schema.rollout import Stage
from gym_sdk.store import Journal, read_rollouts, reverify
from gym_sdk.store.reverify import partial_path

pytestmark = pytest.mark.asyncio


def stored(path: Path, rollouts: list[Rollout]) -> Path:
    with Journal(path) as journal:
        for rollout in rollouts:
            journal.write(rollout)
    return path


async def by_number(rollout: Rollout) -> Reward:
    assert rollout.reward is None
    assert rollout.failure is None
    number = rollout.task.answer["n"]
    return Reward(value=float(number % 2), components={"odd": float(number % 2)})


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
async def test_rollouts_get_new_rewards_and_stay_what_they_were(tmp_path: Path, suffix: str) -> None:
    cut = attempt(3, reward=None, outcome=Outcome.TRUNCATED, truncation=Truncation.TURNS)
    gone = attempt(6, reward=None, outcome=Outcome.CANCELLED, cancellation=Cancellation.STALE)
    rollouts = [failed(0), attempt(1, reward=0.5), attempt(2), cut, failed(4), attempt(0), gone]
    rollouts.append(failed(5, stage=Stage.VERIFIER))
    source = stored(tmp_path / f"r.{suffix}", rollouts)
    before = source.read_bytes()
    out = tmp_path / "new" / f"r2.{suffix}"
    report = await reverify(source, by_number, out=out, concurrency=3)
    found = {rollout.key: rollout for rollout in read_rollouts(out, every=True)}
    assert {key(n): rollout.reward for n, rollout in enumerate(found[key(n)] for n in range(7))} == {
        key(0): 0.0,
        key(1): 1.0,
        key(2): 0.0,
        key(3): 1.0,
        key(4): None,
        key(5): 1.0,
        key(6): None,
    }
    assert found[key(3)].outcome is Outcome.TRUNCATED
    assert found[key(3)].truncation is Truncation.TURNS
    assert found[key(5)].outcome is Outcome.COMPLETED
    assert found[key(5)].failure is None
    assert found[key(4)] == failed(4)
    assert found[key(6)] == gone
    assert found[key(1)].reward_components == {"odd": 1.0}
    assert found[key(1)].model_calls == attempt(1).model_calls
    assert found[key(1)].timing.verifier_s > 0
    assert (report.rollouts, report.verified, report.failed, report.kept) == (7, 5, 0, 2)
    assert (report.recovered, report.compared, report.changed) == (2, 3, 3)
    assert (report.mean_before, report.mean_after) == (2.5 / 3, 1 / 3)
    assert "kept=2" in str(report)
    assert source.read_bytes() == before
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]


async def test_a_failed_verification_is_no_reward(tmp_path: Path) -> None:
    async def picky(rollout: Rollout) -> float:
        number = rollout.task.answer["n"]
        if number == 0:
            raise ZeroDivisionError("by zero")
        if number == 1:
            await anyio.sleep_forever()
        return float("nan") if number == 2 else 1.0

    cut = attempt(0, outcome=Outcome.TRUNCATED, truncation=Truncation.TOKENS)
    source = stored(tmp_path / "r.jsonl", [cut, *(attempt(n) for n in range(1, 4))])
    out = tmp_path / "out.jsonl"
    report = await reverify(source, picky, out=out, deadline_s=0.05)
    found = {rollout.task.answer["n"]: rollout for rollout in read_rollouts(out)}
    kinds = {number: rollout.failure and rollout.failure.kind for number, rollout in found.items()}
    assert kinds == {0: FailureKind.VERIFIER, 1: FailureKind.DEADLINE, 2: FailureKind.VERIFIER, 3: None}
    assert all(found[number].reward is None for number in range(3))
    assert all(found[number].outcome is Outcome.FAILED for number in range(3))
    assert (report.verified, report.failed, report.changed, report.compared) == (1, 3, 0, 1)
    again = await reverify(out, by_number, out=tmp_path / "third.jsonl")
    assert (again.verified, again.recovered) == (4, 3)
    third = {rollout.task.answer["n"]: rollout for rollout in read_rollouts(tmp_path / "third.jsonl")}
    assert third[0].outcome is Outcome.TRUNCATED
    assert third[0].truncation is Truncation.TOKENS


async def test_how_a_rollout_ended_is_found_out(tmp_path: Path) -> None:
    """The first verifier failed, and only the rollout's calls still say that it had been cut."""
    tokens, turns = failed(0, stage=Stage.VERIFIER), failed(1, stage=Stage.GROUP_VERIFIER)
    tokens.model_calls[-1].status = "incomplete"
    turns.model_calls[-1].end_item = 1
    source = stored(tmp_path / "r.jsonl", [tokens, turns])
    await reverify(source, by_number, out=tmp_path / "out.jsonl")
    found = [rollout.truncation for rollout in read_rollouts(tmp_path / "out.jsonl")]
    assert found == [Truncation.TOKENS, Truncation.TURNS]


async def test_a_cancelled_call_goes_on_from_there(tmp_path: Path) -> None:
    source = stored(tmp_path / "r.jsonl", [attempt(n) for n in range(20)])
    out = tmp_path / "out.jsonl"
    seen: list[int] = []
    enough = asyncio.Event()

    async def slow(rollout: Rollout) -> float:
        number: int = rollout.task.answer["n"]
        seen.append(number)
        if len(seen) > 10:
            enough.set()
            await anyio.sleep_forever()
        return float(number)

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: reverify(source, slow, out=out, concurrency=4))
        await enough.wait()
        group.cancel_scope.cancel()
    assert not out.exists()
    with Journal(partial_path(out)) as journal:
        assert len(journal) == 10

    async def quick(rollout: Rollout) -> float:
        seen.append(rollout.task.answer["n"])
        return float(rollout.task.answer["n"])

    seen.clear()
    report = await reverify(source, quick, out=out)
    assert sorted(seen) == list(range(10, 20))
    assert report.verified == 20
    assert {rollout.task.answer["n"]: rollout.reward for rollout in read_rollouts(out, every=True)} == {
        n: float(n) for n in range(20)
    }
    assert not partial_path(out).exists()


async def test_at_most_so_many_at_once_and_threads_for_plain_functions(tmp_path: Path) -> None:
    source = stored(tmp_path / "r.jsonl", [attempt(n) for n in range(30)])
    running = most = 0

    async def counted(rollout: Rollout) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001)
        running -= 1
        return 1.0

    await reverify(source, counted, out=tmp_path / "a.jsonl", concurrency=7)
    assert most == 7

    def plain(rollout: Rollout) -> bool:
        time.sleep(0.001)
        return True

    assert (await reverify(source, plain, out=tmp_path / "b.jsonl")).mean_after == 1.0


async def test_a_full_disk_is_one_error_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored(tmp_path / "r.jsonl", [attempt(n) for n in range(8)])
    out, write, left = tmp_path / "out.jsonl", os.write, [3]

    def filling(descriptor: int, data: memoryview) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling)
        with pytest.raises(StoreError, match="No space left on device"):
            await reverify(source, by_number, out=out)
    assert not out.exists()
    assert len(list(read_rollouts(partial_path(out)))) == 3
    assert (await reverify(source, by_number, out=out)).verified == 8


async def test_misuse(tmp_path: Path) -> None:
    source = stored(tmp_path / "r.jsonl", [attempt(0)])
    out = tmp_path / "out.jsonl"
    with pytest.raises(StoreError, match="exists already"):
        await reverify(source, by_number, out=source)
    with pytest.raises(ConfigurationError, match="concurrency=0"):
        await reverify(source, by_number, out=out, concurrency=0)
    with pytest.raises(StoreError, match="cannot be read"):
        await reverify(tmp_path / "missing.jsonl", by_number, out=out)
    for other in (attempt(7), attempt(task=Task("another", id="task-0"))):
        stored(partial_path(out), [other])
        with pytest.raises(StoreError, match=r"out\.partial\.jsonl: has .* had another source. Remove"):
            await reverify(source, by_number, out=out)
        partial_path(out).unlink()
    assert (await reverify(stored(tmp_path / "empty.jsonl", []), by_number, out=out)).rollouts == 0
    assert list(read_rollouts(out)) == []
