"""Weights as tensors and by broadcast into the real SGLang: every token's log-prob is its version's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
import torch
from aiohttp.test_utils import TestServer
from transformers import PreTrainedModel

from backends.engine import (
    BroadcastWeights,
    FolderWeights,
    Generation,
    GenerationRequest,
    SamplingParams,
    TensorSpec,
    TensorWeights,
)
from backends.policy import Policy
from backends.server import make_app
from backends.sglang import SGLangConfig, SGLangEngine, SGLangProcess
from backends.sglang.weights import shared
from gym_sdk import GymClient
from gym_sdk.errors import CheckpointError, DeadlineError, GymError, PolicyError, TransportError
from gym_sdk.grpo import BroadcastSync, TensorSync, WeightSync

pytestmark = [pytest.mark.asyncio, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(300)]

Scores = Callable[..., list[float]]
PROMPT = [5, 17, 42, 108, 9]
TOLERANCE = 1e-4
BUCKET = 200_000
"""The tiny policy's tensors take several of them."""


SHARED = SGLangConfig().shared_memory
both_ways = pytest.mark.parametrize("small", [SHARED, None], indirect=True, ids=["shared", "inside"])
"""Tensors by shared memory, and inside the requests."""


@pytest_asyncio.fixture
async def small(
    sglang: SGLangProcess, tiny_policy: Path, request: pytest.FixtureRequest
) -> AsyncIterator[SGLangEngine]:
    """An engine that sends little at a time, on the tiny policy's weights."""
    config = SGLangConfig(bucket_bytes=BUCKET, shared_memory=getattr(request, "param", SHARED))
    async with await SGLangEngine.connect(sglang.url, model=tiny_policy, config=config) as engine:
        await engine.update_weights(FolderWeights(tiny_policy), version="0")
        yield engine


def policy(engine: SGLangEngine) -> Policy:
    return Policy(engine, cast(Any, None))


@asynccontextmanager
async def served(engine: SGLangEngine) -> AsyncIterator[GymClient]:
    """A client of our own server over the engine."""
    async with TestServer(make_app(policy(engine))) as server:
        async with GymClient(str(server.make_url("/v1"))) as client:
            yield client


def request(name: str, tokens: int = 250) -> GenerationRequest:
    return GenerationRequest(name, PROMPT, SamplingParams(max_new_tokens=tokens))


def worst(generation: Generation, forward: Scores, models: Mapping[str, PreTrainedModel]) -> float:
    expected = {name: forward(model, PROMPT, generation, 1.0) for name, model in models.items()}
    return max(
        abs(generation.log_probs[place] - expected[span.version][place])
        for span in generation.weight_versions
        for place in range(span.start, span.end)
    )


@asynccontextmanager
async def syncing(kind: str, engine: SGLangEngine) -> AsyncIterator[WeightSync]:
    """A way of the trainer's to the engine, directly or through our server."""
    if kind == "tensors":
        yield TensorSync(policy(engine))
    elif kind == "broadcast":
        async with BroadcastSync(policy(engine), bucket_bytes=BUCKET, deadline_s=60) as sync:
            yield sync
    else:
        async with served(engine) as client:
            if kind == "tensors over HTTP":
                yield TensorSync(client)
            else:
                async with BroadcastSync(client, bucket_bytes=BUCKET, deadline_s=60) as sync:
                    yield sync


@pytest.mark.parametrize(
    ("kind", "small"),
    [
        ("tensors", SHARED),
        ("tensors", None),
        ("tensors over HTTP", SHARED),
        ("tensors over HTTP", None),
        ("broadcast", None),
        ("broadcast over HTTP", None),
    ],
    indirect=["small"],
)
async def test_updates_in_flight_are_told_apart_token_for_token(
    small: SGLangEngine, trained: PreTrainedModel, untrained: PreTrainedModel, forward: Scores, kind: str
) -> None:
    models = {"0": trained, "1": untrained, "2": trained}
    async with syncing(kind, small) as sync:
        tasks = [asyncio.create_task(small.generate(request(f"{kind}-{index}"))) for index in range(4)]
        for version in ("1", "2"):
            await asyncio.sleep(0.1)
            await sync.push(models[version], version=version)
            assert small.info.weight_version == version
        generations = [await task for task in tasks]
    assert max(len(generation.weight_versions) for generation in generations) >= 2
    after = await small.generate(request("after", 16))
    assert [span.version for span in after.weight_versions] == ["2"]
    for generation in [*generations, after]:
        assert worst(generation, forward, models) < TOLERANCE


@both_ways
async def test_nothing_cached_outlives_the_weights(
    small: SGLangEngine, untrained: PreTrainedModel, forward: Scores
) -> None:
    first = await small.generate(request("first", 4))
    assert first.cached_tokens == 0
    assert (await small.generate(request("again", 4))).cached_tokens > 0
    await small.update_weights(TensorWeights(untrained.state_dict()), version="1")
    generation = await small.generate(request("new", 4))
    assert generation.cached_tokens == 0
    assert worst(generation, forward, {"1": untrained}) < TOLERANCE


def changed(tensors: Mapping[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    match how:
        case "shape":
            tensors[name] = tensors[name][:-1]
        case "type":
            tensors[name] = tensors[name].to(torch.int8)
        case "missing":
            del tensors[name]
        case "unknown":
            tensors["model.more.weight"] = tensors[name]
        case "untied":
            tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
        case "empty":
            tensors = {}
    return tensors


@pytest.mark.parametrize("how", ["shape", "type", "missing", "unknown", "untied", "empty"])
async def test_tensors_of_another_model_are_refused_before_anything_is_sent(
    small: SGLangEngine, untrained: PreTrainedModel, trained: PreTrainedModel, forward: Scores, how: str
) -> None:
    task = asyncio.create_task(small.generate(request("flying", 100)))
    source = TensorWeights(changed(untrained.state_dict(), how))
    with pytest.raises(CheckpointError):
        await small.update_weights(source, version="bad")
    assert small.info.weight_version == "0"
    generation = await task
    assert [span.version for span in generation.weight_versions] == ["0"]
    assert worst(generation, forward, {"0": trained}) < TOLERANCE


async def test_a_broadcast_of_another_model_is_refused_and_the_next_one_works(
    small: SGLangEngine, untrained: PreTrainedModel, trained: PreTrainedModel, forward: Scores
) -> None:
    class Other:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return changed(untrained.state_dict(), "shape")

    async with syncing("broadcast over HTTP", small) as sync:
        with pytest.raises(PolicyError, match="does not fit the model"):
            await sync.push(cast(Any, Other()), version="bad")
        generation = await small.generate(request("old", 8))
        assert worst(generation, forward, {"0": trained}) < TOLERANCE
        await sync.push(untrained, version="1")
    generation = await small.generate(request("new", 8))
    assert worst(generation, forward, {"1": untrained}) < TOLERANCE


@pytest.mark.parametrize("forgets", ["engine", "SGLang"])
async def test_a_group_that_is_not_known_any_more_is_made_anew(
    small: SGLangEngine, untrained: PreTrainedModel, trained: PreTrainedModel, forward: Scores, forgets: str
) -> None:
    async with BroadcastSync(policy(small), bucket_bytes=BUCKET, deadline_s=60) as sync:
        await sync.push(untrained, version="1")
        name = sync._name
        if forgets == "engine":
            await small.leave_group(name)
        else:
            await small._client.post("/destroy_weights_update_group", {"group_name": name})
        await sync.push(trained, version="2")
        assert sync._name not in ("", name)
    generation = await small.generate(request("after", 16))
    assert worst(generation, forward, {"2": trained}) < TOLERANCE


async def test_an_unknown_group_changes_nothing(small: SGLangEngine, trained: PreTrainedModel) -> None:
    source = BroadcastWeights("nobody", (TensorSpec("a", "float32", (1,)),))
    task = asyncio.create_task(small.generate(request("flying", 50)))
    with pytest.raises(PolicyError, match="not known") as caught:
        await small.update_weights(source, version="1")
    assert caught.value.code == "weights_group_unknown"
    assert [span.version for span in (await task).weight_versions] == ["0"]
    await small.leave_group("nobody")


class Stopping(BroadcastSync):
    """A trainer that is gone after the first bucket."""

    async def push(self, model: PreTrainedModel, *, version: str) -> None:
        await super().push(model, version="ready")
        assert self._group is not None
        send, count = self._group.broadcast, 0

        async def once(tensors: Any) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise TransportError("the trainer is gone", retryable=False)
            await send(tensors)

        self._group.broadcast = once  # type: ignore[method-assign]
        await super().push(model, version=version)


async def test_after_half_a_broadcast_the_old_folder_serves_again(
    small: SGLangEngine,
    tiny_policy: Path,
    trained: PreTrainedModel,
    untrained: PreTrainedModel,
    forward: Scores,
) -> None:
    async with Stopping(policy(small), bucket_bytes=BUCKET, deadline_s=60) as sync:
        ready = small.update_weights

        async def from_folder(source: Any, *, version: str) -> None:
            await ready(FolderWeights(tiny_policy) if version == "ready" else source, version=version)

        # a first push that arrives as a folder
        async def first(source: Any, *, version: str) -> None:
            await ready(source, version=version)
            if version == "ready":
                await ready(FolderWeights(tiny_policy), version="folder")

        small.update_weights = first  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match="old weights are serving"):
            await sync.push(untrained, version="half")
    assert small.unfit is None
    assert small.info.weight_version == "folder"
    generation = await small.generate(request("after", 32))
    assert worst(generation, forward, {"folder": trained}) < TOLERANCE


async def test_half_a_broadcast_on_tensors_leaves_nothing_to_sample_from(
    small: SGLangEngine,
    tiny_policy: Path,
    trained: PreTrainedModel,
    untrained: PreTrainedModel,
    forward: Scores,
) -> None:
    task = asyncio.create_task(small.generate(request("flying", 900)))
    async with Stopping(policy(small), bucket_bytes=BUCKET, deadline_s=60) as sync:
        with pytest.raises(GymError, match="mixture"):
            await sync.push(untrained, version="half")
    assert small.unfit is not None
    with pytest.raises(TransportError, match="mixture") as caught:
        await task
    assert caught.value.retryable
    with pytest.raises(TransportError, match="mixture") as caught:
        await small.generate(request("refused", 4))
    assert caught.value.retryable
    await small.update_weights(TensorWeights(trained.state_dict()), version="2")
    assert small.unfit is None
    generation = await small.generate(request("after", 16))
    assert worst(generation, forward, {"2": trained}) < TOLERANCE


async def test_a_trainer_that_sends_nothing_is_waited_for_no_longer_than_the_deadline(
    sglang: SGLangProcess,
    tiny_policy: Path,
    trained: PreTrainedModel,
    untrained: PreTrainedModel,
    forward: Scores,
) -> None:
    config = SGLangConfig(update_s=3.0)
    async with await SGLangEngine.connect(sglang.url, model=tiny_policy, config=config) as engine:
        await engine.update_weights(FolderWeights(tiny_policy), version="0")
        async with BroadcastSync(policy(engine), deadline_s=6) as sync:
            await sync.push(untrained, version="1")
            await engine.update_weights(FolderWeights(tiny_policy), version="2")
            assert sync._group is not None

            async def nothing(tensors: Any) -> None:
                await asyncio.sleep(60)

            sync._group.broadcast = nothing  # type: ignore[method-assign]
            with pytest.raises((DeadlineError, GymError)):
                await sync.push(untrained, version="3")
        # whatever the engine says, its tokens are one version's
        if engine.unfit is not None:
            await engine.update_weights(FolderWeights(tiny_policy), version="2")
        generation = await engine.generate(request("after", 16))
        assert worst(generation, forward, {"2": trained}) < TOLERANCE


@both_ways
async def test_updates_wait_for_each_other(
    small: SGLangEngine, trained: PreTrainedModel, untrained: PreTrainedModel, forward: Scores
) -> None:
    models = {"0": trained, **{str(number): (untrained, trained)[number % 2] for number in range(1, 5)}}
    task = asyncio.create_task(small.generate(request("flying", 300)))
    await asyncio.sleep(0.1)
    await asyncio.gather(
        *(
            small.update_weights(TensorWeights(models[str(number)].state_dict()), version=str(number))
            for number in range(1, 5)
        )
    )
    generation = await task
    assert small.info.weight_version == "4"
    assert worst(generation, forward, models) < TOLERANCE
    assert worst(await small.generate(request("after", 8)), forward, models) < TOLERANCE


@both_ways
@pytest.mark.parametrize("named", [True, False])
async def test_another_engine_does_not_trust_a_path_that_tensors_have_left(
    small: SGLangEngine,
    sglang: SGLangProcess,
    tiny_policy: Path,
    untrained: PreTrainedModel,
    forward: Scores,
    named: bool,
) -> None:
    await small.update_weights(TensorWeights(untrained.state_dict()), version="7")
    async with await SGLangEngine.connect(sglang.url, model=tiny_policy if named else None) as other:
        assert other.info.weight_version == "7"
        assert not other.facts.unchanged
        assert other.facts.signature == small.facts.signature
        assert other.facts.vocab_size == small.facts.vocab_size
        path = Path(other.facts.model_path)
        if small._client.config.shared_memory is None:
            assert path == tiny_policy
        else:
            assert path.parent == Path(small._client.config.shared_memory)
            assert not path.exists()
        generation = await other.generate(request("other", 16))
        assert worst(generation, forward, {"7": untrained}) < TOLERANCE


async def test_an_sglang_that_cannot_see_the_file_gets_the_tensors_all_the_same(
    small: SGLangEngine, untrained: PreTrainedModel, forward: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_FILE", "model.unseen")  # as if it had a memory of its own
    await small.update_weights(TensorWeights(untrained.state_dict()), version="1")
    generation = await small.generate(request("after", 16))
    assert worst(generation, forward, {"1": untrained}) < TOLERANCE
