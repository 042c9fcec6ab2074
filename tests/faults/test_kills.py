"""A collector that is killed at random moments, a hundred times and more, and is started again each time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from support.collecting import check, keys
from support.collectors import collectors, order, output_of
from support.faulty_policy import Asked, Fault, serving

from gym_sdk.schema import RolloutKey
from gym_sdk.store import read_rollouts

pytestmark = pytest.mark.asyncio

KILLS = 110
COUNT, GROUP_SIZE, CONCURRENCY = 320, 2, 6
MOST_CALLS = 10
"""Model calls after which a collector is killed, at most: so few that it is never through before that."""


class Life:
    """One run of the collector, as the server and its output tell."""

    def __init__(self, stored: Counter[str]) -> None:
        self.stored = stored
        """How many rollouts of each task were stored when it began."""
        self.calls = 0
        self.rollouts: dict[str, set[str]] = {}
        """Of each task, by id, for which the server was asked."""
        self.enough = asyncio.Event()
        self.calls_left = MOST_CALLS

    def note(self, asked: Asked) -> Fault:
        self.calls += 1
        self.calls_left -= 1
        if self.calls_left <= 0:
            self.enough.set()
        self.rollouts.setdefault(f"task-{asked.question:06d}", set()).add(asked.rollout_id)
        return None

    def check(self, seed: int) -> None:
        """Check that nothing was sampled that was in the store already."""
        for task_id, ids in self.rollouts.items():
            assert len(ids) <= GROUP_SIZE - self.stored[task_id], f"seed {seed}: {task_id} was sampled again"


class Store:
    """The journal as it is found after each kill: what was there once has to stay as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[RolloutKey, bytes] = {}
        self.ids: dict[RolloutKey, str] = {}
        self._read = 0

    def look(self) -> None:
        """Take in the lines that are new; a last one that is torn is none."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                data = json.loads(line)
                key = RolloutKey(data["task"]["id"], data["epoch"], data["index"])
                assert key not in self.lines, f"{key} was stored twice"
                self.lines[key], self.ids[key] = line, data["id"]

    def tear(self, chance: random.Random) -> None:
        """Leave the beginning of a line at its end, as a kill within the write of a large one does.

        It is one that is stored already, and without its newline alone it would be kept, as it should.
        """
        line = chance.choice(list(self.lines.values()))
        with self.path.open("ab") as file:
            file.write(line[: chance.randrange(1, len(line) - 1)])

    @property
    def by_task(self) -> Counter[str]:
        return Counter(key.task_id for key in self.lines)


async def test_killed_at_random_moments(tmp_path: Path) -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    store = Store(tmp_path / "r.jsonl")
    store.path.touch()
    acknowledged: dict[RolloutKey, str] = {}
    life = Life(Counter())
    kills = 0
    with collectors() as process:
        async with (
            output_of(process) as reader,
            serving(lambda asked: life.note(asked), latency_s=0.001) as policy,
            asyncio.timeout(100),
        ):
            while True:
                life = Life(store.by_task)
                life.calls_left = chance.randint(1, MOST_CALLS)
                order(
                    process,
                    url=policy.url,
                    store=str(store.path),
                    count=COUNT,
                    group_size=GROUP_SIZE,
                    concurrency=CONCURRENCY,
                )
                pid = int(await reader.readline())
                if kills < KILLS:
                    if chance.random() < 0.25:  # while it starts, reads its store, or has just begun
                        await asyncio.sleep(chance.uniform(0.0, 0.05))
                    else:
                        await life.enough.wait()
                        await asyncio.sleep(chance.uniform(0.0, 0.004))
                    os.kill(pid, signal.SIGKILL)
                delivered = Counter[RolloutKey]()
                while (line := await reader.readline()).startswith(b"["):
                    for *key, rollout_id in json.loads(line):
                        delivered[RolloutKey(*key)] += 1
                        assert acknowledged.setdefault(RolloutKey(*key), rollout_id) == rollout_id, (
                            f"seed {seed}"
                        )
                assert not delivered or max(delivered.values()) == 1, f"seed {seed}"
                store.look()
                if line == b"killed\n" and store.lines and chance.random() < 0.2:
                    store.tear(chance)
                assert acknowledged.items() <= store.ids.items(), (
                    f"seed {seed}: what was delivered is not stored"
                )
                life.check(seed)
                if line == b"done\n":
                    break
                assert line == b"killed\n", (seed, line)
                kills += 1
    assert kills == KILLS, f"seed {seed}"
    assert set(delivered) == keys(COUNT, GROUP_SIZE), f"seed {seed}"
    check(read_rollouts(store.path, every=True), store.path, count=COUNT, group_size=GROUP_SIZE)
    assert store.path.read_bytes() == b"".join(store.lines.values())
    # each kill costs what was in flight, and nothing else
    assert policy.samples <= 2 * COUNT * GROUP_SIZE + kills * 2 * CONCURRENCY, f"seed {seed}"
