"""The trainer's side of a broadcast: a real process group of gloo, the other rank a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from gym_sdk.errors import (
    ConfigurationError,
    DeadlineError,
    GymError,
    PolicyError,
    TransportError,
)
from gym_sdk.grpo import BroadcastSync
from gym_sdk.schema.weights import BroadcastWeights, WeightsGroup, in_buckets

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(90)]

Models = Callable[..., PreTrainedModel]

RECEIVER = """
import datetime, json, sys
import torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

wait = datetime.timedelta(seconds=60)
name, port, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=wait)
group, _ = c10d._new_process_group_helper(
    2, 1, [], c10d.Backend("gloo"), c10d.PrefixStore(name, store), group_name=name, timeout=wait
)
c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
print("joined", flush=True)
for line in sys.stdin:
    found = {}
    for bucket in json.loads(line):
        for key, dtype, shape in bucket:
            found[key] = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(found[key], src=0, group=group)
    torch.save(found, out)
    print("received", flush=True)
"""


class Engine:
    """Rank 1: a process that receives what it is told to expect."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "received.pt"
        self.groups: list[WeightsGroup] = []
        self.left: list[str] = []
        self.versions: list[str] = []
        self.error: GymError | None = None
        self.absent = False
        self.silent = False
        self._process: asyncio.subprocess.Process | None = None

    async def weight_ranks(self) -> int:
        return 1

    async def join_weights_group(self, group: WeightsGroup) -> None:
        self.groups.append(group)
        if self.absent:
            raise TransportError("the engine is gone", retryable=True)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RECEIVER, group.name, str(group.port), str(self.file)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await self._says(b"joined")

    async def update_weights(self, source: Any, *, version: str) -> None:
        assert isinstance(source, BroadcastWeights)
        if source.group != self.groups[-1].name or self._process is None:
            raise PolicyError("unknown", status=404, code="weights_group_unknown")
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.silent:
            await asyncio.sleep(60)
        buckets = in_buckets(source.tensors, source.bucket_bytes)
        lines = [[[spec.name, spec.dtype, spec.shape] for spec in bucket] for bucket in buckets]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(lines).encode() + b"\n")
        await self._says(b"received")
        self.versions.append(version)

    async def leave_weights_group(self, name: str) -> None:
        self.left.append(name)
        await self.die()

    async def die(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _says(self, word: bytes) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        if (await self._process.stdout.readline()).strip() != word:
            raise TransportError("the receiver ended", retryable=True)

    def received(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = torch.load(self.file)
        return found


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    await engine.die()


def same(model: PreTrainedModel, found: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return found.keys() == state.keys() - tied and all(
        torch.equal(found[name], state[name]) for name in found
    )


async def test_what_is_pushed_arrives_and_the_group_is_made_once(make_model: Models, engine: Engine) -> None:
    model = make_model()
    async with BroadcastSync(engine, bucket_bytes=5_000, deadline_s=60) as sync:
        for version in ("1", "2"):
            with torch.no_grad():
                model.get_decoder().norm.weight.mul_(1.5)
            await sync.push(model, version=version)
            assert same(model, engine.received())
    assert engine.versions == ["1", "2"]
    (group,) = engine.groups
    assert (group.first_rank, group.world_size, group.backend) == (1, 2, "gloo")
    assert engine.left == [group.name]


async def test_an_engine_that_was_started_again_gets_a_new_group(make_model: Models, engine: Engine) -> None:
    model = make_model()
    async with BroadcastSync(engine, deadline_s=60) as sync:
        await sync.push(model, version="1")
        await engine.die()
        await sync.push(model, version="2")
        assert same(model, engine.received())
    assert engine.versions == ["1", "2"]
    assert len({group.name for group in engine.groups}) == 2


async def test_an_engine_that_always_forgets_is_asked_twice(make_model: Models, engine: Engine) -> None:
    class Forgetful(Engine):
        async def update_weights(self, source: Any, *, version: str) -> None:
            raise PolicyError("unknown", code="weights_group_unknown")

    forgetful = Forgetful(engine.file.parent)
    async with BroadcastSync(forgetful, deadline_s=60) as sync:
        with pytest.raises(PolicyError, match="unknown"):
            await sync.push(make_model(), version="1")
    assert len(forgetful.groups) == 2


@pytest.mark.parametrize("error", [PolicyError("does not fit"), TransportError("gone", retryable=True)])
async def test_after_any_other_error_the_next_push_begins_anew(
    make_model: Models, engine: Engine, error: GymError
) -> None:
    model = make_model()
    async with BroadcastSync(engine, deadline_s=60) as sync:
        engine.error = error
        with pytest.raises(type(error), match=str(error)):
            await sync.push(model, version="1")
        await sync.push(model, version="2")
        assert same(model, engine.received())
    assert engine.versions == ["2"]
    assert len(engine.groups) == 2


async def test_an_engine_that_never_takes_them_is_not_waited_for(make_model: Models, engine: Engine) -> None:
    """And the event loop goes on meanwhile, and afterwards."""
    stalls, going = [0.0], True

    async def tick() -> None:
        last = time.monotonic()
        while going:
            await asyncio.sleep(0.01)
            last, before = time.monotonic(), last
            stalls.append(last - before)

    # more than the sockets' buffers hold
    model = make_model()
    model.register_buffer("big", torch.zeros(8_000_000))
    ticking = asyncio.create_task(tick())
    sync = BroadcastSync(engine, deadline_s=20)
    await sync.push(model, version="1")
    engine.silent = True
    sync._deadline_s = 2.0
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        await sync.push(model, version="2")
    await sync.aclose()
    assert time.monotonic() - began < 8.0
    going = False
    await ticking
    assert max(stalls) < 1.5


async def test_an_engine_that_cannot_join_is_told_so_at_once(make_model: Models, engine: Engine) -> None:
    engine.absent = True
    began = time.monotonic()
    sync = BroadcastSync(engine, deadline_s=5)
    with pytest.raises(TransportError, match="the engine is gone"):
        await sync.push(make_model(), version="1")
    assert time.monotonic() - began < 4.0
    engine.absent = False
    await sync.push(make_model(), version="1")
    await sync.aclose()


async def test_nonsense_is_refused(make_model: Models, engine: Engine) -> None:
    for options in ({"bucket_bytes": 0}, {"deadline_s": 0.0}):
        with pytest.raises(ConfigurationError, match="positive"):
            BroadcastSync(engine, **options)  # type: ignore[arg-type]
    sync = BroadcastSync(engine, address="256.256.256.256", deadline_s=2)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        await sync.push(make_model(), version="1")
