"""Aborts, pauses and weight updates of the real SGLang."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from backends.engine import (
    FinishReason,
    FolderWeights,
    Generation,
    GenerationRequest,
    PauseMode,
    SamplingParams,
)
from backends.sglang import SGLangEngine
from gym_sdk.errors import CheckpointError, ConfigurationError

pytestmark = [pytest.mark.asyncio, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(300)]

Scores = Callable[..., list[float]]
PROMPT = [5, 17, 42, 108, 9]
LONG = SamplingParams(max_new_tokens=900)
TOLERANCE = 1e-4


def request(name: str, tokens: int = 900) -> GenerationRequest:
    return GenerationRequest(name, PROMPT, SamplingParams(max_new_tokens=tokens))


async def running(engine: SGLangEngine) -> int:
    """How many requests SGLang itself is working on."""
    loads = (await engine._client.get("/v1/loads"))["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


async def until_running(engine: SGLangEngine, count: int) -> None:
    async with asyncio.timeout(30):
        while await running(engine) != count:
            await asyncio.sleep(0.02)


def worst(
    generation: Generation, forward: Scores, models: dict[str, PreTrainedModel], prompt: list[int]
) -> float:
    """The largest distance of a log-prob to what the model of its weight version says."""
    expected = {name: forward(model, prompt, generation, 1.0) for name, model in models.items()}
    return max(
        abs(generation.log_probs[place] - expected[span.version][place])
        for span in generation.weight_versions
        for place in range(span.start, span.end)
    )


async def test_an_aborted_request_keeps_its_tokens_and_frees_its_slot(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores
) -> None:
    tasks = [asyncio.create_task(engine.generate(request(f"abort-{index}"))) for index in range(8)]
    await until_running(engine, 8)
    assert engine.info.running == 8
    assert await engine.abort("abort-1") == 1
    generation = await tasks[1]
    assert generation.finish_reason is FinishReason.ABORT
    assert 0 < len(generation.token_ids) < 900
    assert worst(generation, forward, {engine.info.weight_version: trained}, PROMPT) < TOLERANCE
    assert await engine.abort("abort-1") == 0
    await until_running(engine, 7)
    assert await engine.abort() == 7
    assert {(await task).finish_reason for task in [tasks[0], *tasks[2:]]} == {FinishReason.ABORT}
    await until_running(engine, 0)
    assert engine.info.running == 0


async def test_whoever_goes_away_frees_the_slot(engine: SGLangEngine) -> None:
    tasks = [asyncio.create_task(engine.generate(request(f"cancel-{index}"))) for index in range(4)]
    async with aclosing(engine.stream(request("stream"))) as stream:  # type: ignore[type-var]
        async for _ in stream:
            break
        await until_running(engine, 5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until_running(engine, 0)


async def test_a_stream_that_is_aborted_ends_so(engine: SGLangEngine) -> None:
    pieces = []
    async for piece in engine.stream(request("stream")):
        pieces.append(piece)
        if len(pieces) == 3:
            await engine.abort("stream")
    assert pieces[-1].finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_what_is_paused_continues(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores, mode: PauseMode
) -> None:
    task = asyncio.create_task(engine.generate(request("before", 300)))
    await until_running(engine, 1)
    await engine.pause(mode)
    late = asyncio.create_task(engine.generate(request("late", 4)))
    lost = asyncio.create_task(engine.generate(request("lost", 4)))
    await asyncio.sleep(0.3)
    assert not task.done()
    assert not late.done()
    assert engine.info.waiting == 2
    assert await engine.abort("lost") == 1
    assert (await lost).finish_reason is FinishReason.ABORT
    await engine.continue_generation()
    await engine.continue_generation()
    assert len((await late).token_ids) == 4
    generation = await task
    assert len(generation.token_ids) == 300
    assert worst(generation, forward, {engine.info.weight_version: trained}, PROMPT) < TOLERANCE


@pytest.mark.parametrize("before", [None, "in_place", "retract"])
async def test_a_pause_can_abort_what_runs(
    engine: SGLangEngine, trained: PreTrainedModel, forward: Scores, before: PauseMode | None
) -> None:
    tasks = [asyncio.create_task(engine.generate(request(f"pause-{index}"))) for index in range(4)]
    await until_running(engine, 4)
    await asyncio.sleep(0.2)
    if before is not None:
        await engine.pause(before)
    await engine.pause("abort")
    late = asyncio.create_task(engine.generate(request("late", 4)))
    for task in tasks:
        generation = await task
        assert generation.finish_reason is FinishReason.ABORT
        if before is None:  # SGLang passes tokens on now and then only; those of a paused request may be lost
            assert generation.token_ids
        if generation.token_ids:
            assert worst(generation, forward, {engine.info.weight_version: trained}, PROMPT) < TOLERANCE
    assert not late.done()
    await engine.continue_generation()
    assert len((await late).token_ids) == 4


async def test_there_is_no_other_pause(engine: SGLangEngine) -> None:
    with pytest.raises(ConfigurationError, match="pause mode"):
        await engine.pause("gently")  # type: ignore[arg-type]


async def test_updates_in_flight_are_told_apart_token_for_token(
    engine: SGLangEngine,
    tiny_policy: Path,
    untrained_policy: Path,
    trained: PreTrainedModel,
    untrained: PreTrainedModel,
    forward: Scores,
) -> None:
    """Each token's log-prob is that of the weights which its span names, after any number of updates."""
    models = {engine.info.weight_version: trained}
    folders = [(untrained_policy, untrained), (tiny_policy, trained)]
    rng = random.Random(5)
    prompts = [[*PROMPT, 20 + index] for index in range(6)]
    params = SamplingParams(max_new_tokens=250)
    batch = [GenerationRequest(f"update-{index}", prompt, params) for index, prompt in enumerate(prompts)]
    tasks = [asyncio.create_task(engine.generate(one)) for one in batch]
    await until_running(engine, len(batch))
    for number in range(4):
        await asyncio.sleep(rng.uniform(0.0, 0.2))
        folder, model = folders[number % 2]
        models[f"update-{number}"] = model
        await engine.update_weights(FolderWeights(folder), version=f"update-{number}")
        assert engine.info.weight_version == f"update-{number}"
    generations = [await task for task in tasks]
    assert max(len(generation.weight_versions) for generation in generations) >= 3
    for prompt, generation in zip(prompts, generations, strict=True):
        assert len(generation.token_ids) == 250
        assert worst(generation, forward, models, prompt) < TOLERANCE


async def test_a_stream_never_names_the_wrong_weights(
    engine: SGLangEngine,
    untrained_policy: Path,
    trained: PreTrainedModel,
    untrained: PreTrainedModel,
    forward: Scores,
) -> None:
    before = engine.info.weight_version
    pieces = []
    update = None
    async for piece in engine.stream(request("stream", 200)):
        pieces.append(piece)
        if len(pieces) == 5:
            update = asyncio.create_task(
                engine.update_weights(FolderWeights(untrained_policy), version="new")
            )
    assert update is not None
    await update
    assert [piece.finish_reason for piece in pieces].count(None) == len(pieces) - 1
    assert {piece.weight_version for piece in pieces} == {before, "new"}
    ids = [token for piece in pieces for token in piece.token_ids]
    assert len(ids) == 200
    whole = Generation(ids, [], FinishReason.LENGTH, ())
    expected = {before: forward(trained, PROMPT, whole, 1.0), "new": forward(untrained, PROMPT, whole, 1.0)}
    place = 0
    for piece in pieces:
        for score in piece.log_probs:
            assert abs(score - expected[piece.weight_version][place]) < TOLERANCE
            place += 1


async def test_an_update_in_a_pause_leaves_it_paused(
    engine: SGLangEngine, untrained_policy: Path, untrained: PreTrainedModel, forward: Scores
) -> None:
    await engine.pause("in_place")
    task = asyncio.create_task(engine.generate(request("waits", 16)))
    await engine.update_weights(FolderWeights(untrained_policy), version="paused")
    await asyncio.sleep(0.3)
    assert not task.done()
    await engine.continue_generation()
    generation = await task
    assert [span.version for span in generation.weight_versions] == ["paused"]
    assert worst(generation, forward, {"paused": untrained}, PROMPT) < TOLERANCE


def damaged(folder: Path, target: Path, damage: str) -> Path:
    """A copy of a model's folder with something wrong in it."""
    if damage == "missing":
        return target
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
        return target
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    if damage == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif damage == "lacks":
        del tensors[name]
    else:
        tensors["model.more.weight"] = tensors[name].clone()
    save_file(tensors, file)
    return target


@pytest.mark.parametrize("damage", ["missing", "cut", "shape", "lacks", "unknown"])
async def test_a_folder_that_cannot_be_used_leaves_the_old_weights_serving(
    engine: SGLangEngine,
    tiny_policy: Path,
    trained: PreTrainedModel,
    forward: Scores,
    tmp_path: Path,
    damage: str,
) -> None:
    version = engine.info.weight_version
    task = asyncio.create_task(engine.generate(request("flying", 200)))
    await until_running(engine, 1)
    with pytest.raises(CheckpointError):
        await engine.update_weights(
            FolderWeights(damaged(tiny_policy, tmp_path / "bad", damage)), version="bad"
        )
    assert engine.info.weight_version == version
    for generation in (await task, await engine.generate(request("after", 16))):
        assert [span.version for span in generation.weight_versions] == [version]
        assert worst(generation, forward, {version: trained}, PROMPT) < TOLERANCE


async def test_what_sglang_refuses_is_undone(
    engine: SGLangEngine,
    trained: PreTrainedModel,
    forward: Scores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("backends.sglang.weights.carriers.check_folder", lambda *_: None)
    version = engine.info.weight_version
    task = asyncio.create_task(engine.generate(request("flying", 200)))
    await until_running(engine, 1)
    with pytest.raises(CheckpointError, match="the old weights are serving"):
        await engine.update_weights(FolderWeights(tmp_path / "nowhere"), version="bad")
    assert engine.info.weight_version == version
    for generation in (await task, await engine.generate(request("after", 16))):
        assert worst(generation, forward, {version: trained}, PROMPT) < TOLERANCE
