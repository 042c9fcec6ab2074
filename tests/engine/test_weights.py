from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from backends.engine import FolderWeights, Generation, PauseMode, TensorWeights, WeightSource
from backends.transformers import TransformersEngine
from gym_sdk.errors import CheckpointError
from gym_sdk.tokens import WeightSpan

pytestmark = pytest.mark.asyncio

Compute = Callable[..., torch.Tensor]


@pytest.fixture
def newer(model: PreTrainedModel, make_model: Callable) -> PreTrainedModel:
    """Other weights for `model`'s architecture."""
    return make_model(model.config.model_type, seed=9)


def check_spans(
    generation: Generation,
    prompt: Sequence[int],
    models: Sequence[PreTrainedModel],
    forward_log_probs: Compute,
) -> None:
    """Each span's log-probs are those of its weights, over the whole history."""
    for span, model in zip(generation.weight_versions, models, strict=True):
        expected = forward_log_probs(model, prompt, generation.token_ids)[span.start : span.end]
        actual = torch.tensor(generation.log_probs[span.start : span.end])
        assert float((expected - actual).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["tensors", "folder"])
async def test_an_update_in_flight_gives_two_exact_spans(
    model: PreTrainedModel,
    newer: PreTrainedModel,
    kind: str,
    tmp_path: Path,
    make_request: Callable,
    make_prompt: Callable,
    slow: Callable,
    in_progress: Callable,
    forward_log_probs: Compute,
) -> None:
    older = copy.deepcopy(model)
    newer.save_pretrained(tmp_path)
    source: WeightSource = FolderWeights(tmp_path) if kind == "folder" else TensorWeights(newer.state_dict())
    prompts = [make_prompt(20, seed) for seed in range(4)]
    async with TransformersEngine(model, weight_version="a") as engine:
        slow(engine)
        tasks = [asyncio.create_task(engine.generate(make_request(prompt, 200))) for prompt in prompts]
        await in_progress(engine, 4, tokens=30)
        await engine.update_weights(source, version="b")
        assert engine.info.weight_version == "b"
        for prompt, task in zip(prompts, tasks, strict=True):
            generation = await task
            assert [span.version for span in generation.weight_versions] == ["a", "b"]
            assert generation.weight_versions[-1].end == 200
            check_spans(generation, prompt, (older, newer), forward_log_probs)
        # nothing computed with the old weights may serve a new request
        after = await engine.generate(make_request(prompts[0], 20))
        check_spans(after, prompts[0], (newer,), forward_log_probs)
        assert after.weight_versions == (WeightSpan("b", 0, 20),)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_shared_weights_changed_under_a_pause(
    model: PreTrainedModel,
    newer: PreTrainedModel,
    mode: PauseMode,
    make_request: Callable,
    make_prompt: Callable,
    slow: Callable,
    in_progress: Callable,
    forward_log_probs: Compute,
) -> None:
    older = copy.deepcopy(model)
    prompt = make_prompt(20)
    async with TransformersEngine(model, weight_version="6") as engine:
        slow(engine)
        task = asyncio.create_task(engine.generate(make_request(prompt, 200)))
        await in_progress(engine, 1, tokens=30)
        await engine.pause(mode)
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), newer.parameters(), strict=True):
                parameter.copy_(new)
        await engine.update_weights(TensorWeights({}), version="7")
        await engine.continue_generation()
        generation = await task
    assert [span.version for span in generation.weight_versions] == ["6", "7"]
    check_spans(generation, prompt, (older, newer), forward_log_probs)


async def test_a_streams_chunks_never_span_two_versions(
    model: PreTrainedModel, newer: PreTrainedModel, make_request: Callable, make_prompt: Callable
) -> None:
    async with TransformersEngine(model) as engine:
        versions: list[str] = []
        async for chunk in engine.stream(make_request(make_prompt(5), 120)):
            if not versions:  # at once: the engine goes on meanwhile
                await engine.update_weights(TensorWeights(newer.state_dict()), version="1")
            versions += [chunk.weight_version] * len(chunk.token_ids)
    assert len(versions) == 120
    assert versions == sorted(versions)
    assert set(versions) == {"0", "1"}


async def test_tensors_are_copied(
    qwen3: PreTrainedModel,
    make_model: Callable,
    make_request: Callable,
    make_prompt: Callable,
    worst_difference: Callable,
) -> None:
    newer = make_model("qwen3", seed=9)
    sent = {name: tensor.clone() for name, tensor in newer.state_dict().items()}
    async with TransformersEngine(qwen3) as engine:
        await engine.update_weights(TensorWeights(sent), version="1")
        for tensor in sent.values():
            tensor.zero_()
        generation = await engine.generate(make_request(make_prompt(5), 20))
    assert worst_difference(newer, make_prompt(5), generation) <= 1e-4


async def test_of_tied_names_one_is_enough(qwen3: PreTrainedModel, make_model: Callable) -> None:
    complete = make_model("qwen3", seed=9).state_dict()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= complete.keys()
    async with TransformersEngine(qwen3) as engine:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            partial = {key: tensor for key, tensor in complete.items() if key != name}
            await engine.update_weights(TensorWeights(partial), version=name)
            assert engine.info.weight_version == name
        complete["lm_head.weight"] = complete["lm_head.weight"] + 1
        with pytest.raises(CheckpointError, match="tied in the model and differ"):
            await engine.update_weights(TensorWeights(complete), version="bad")


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: {**t, "other": torch.zeros(1)}, "unknown name other"),
        (lambda t: {**t, "model.norm.weight": torch.zeros(3)}, r"shape \[3\], the model's has \[32\]"),
    ],
    ids=["missing", "unknown", "shape"],
)
async def test_tensors_that_do_not_fit_change_nothing(
    qwen3: PreTrainedModel,
    change: Callable,
    message: str,
    make_model: Callable,
    make_request: Callable,
    make_prompt: Callable,
    slow: Callable,
    in_progress: Callable,
    worst_difference: Callable,
) -> None:
    older = copy.deepcopy(qwen3)
    bad = change(make_model("qwen3", seed=9).state_dict())
    async with TransformersEngine(qwen3) as engine:
        slow(engine)
        task = asyncio.create_task(engine.generate(make_request(make_prompt(5), 200)))
        await in_progress(engine, 1, tokens=5)
        with pytest.raises(CheckpointError, match=message):
            await engine.update_weights(TensorWeights(bad), version="1")
        assert engine.info.weight_version == "0"
        generation = await task
    assert [span.version for span in generation.weight_versions] == ["0"]
    assert worst_difference(older, make_prompt(5), generation) <= 1e-4


async def test_folders_that_do_not_fit_change_nothing(
    qwen3: PreTrainedModel, make_model: Callable, tmp_path: Path
) -> None:
    make_model("qwen3", hidden_size=48).save_pretrained(tmp_path / "wider")
    make_model("llama").save_pretrained(tmp_path / "llama")
    make_model("qwen3").save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    make_model("qwen3").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    before = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}
    async with TransformersEngine(qwen3) as engine:
        for name, message in (
            ("wider", "has shape"),
            ("llama", "is missing"),
            ("cut", "cannot be read"),
            ("empty", "neither"),
            ("nowhere", "neither"),
            ("shards", "cannot be read"),
            ("index", "cannot be read"),
        ):
            with pytest.raises(CheckpointError, match=message) as caught:
                await engine.update_weights(FolderWeights(tmp_path / name), version="1")
            assert caught.value.path.startswith(str(tmp_path / name))
        assert engine.info.weight_version == "0"
    assert all(torch.equal(tensor, before[name]) for name, tensor in qwen3.state_dict().items())


async def test_a_sharded_folder_loads(qwen3: PreTrainedModel, make_model: Callable, tmp_path: Path) -> None:
    newer = make_model("qwen3", seed=9)
    newer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    async with TransformersEngine(qwen3) as engine:
        await engine.update_weights(FolderWeights(tmp_path), version="1")
    assert all(torch.equal(tensor, newer.state_dict()[name]) for name, tensor in qwen3.state_dict().items())


async def test_an_update_while_idle_and_a_repeated_one(
    qwen3: PreTrainedModel,
    make_model: Callable,
    make_request: Callable,
    make_prompt: Callable,
    worst_difference: Callable,
) -> None:
    async with TransformersEngine(qwen3) as engine:
        for seed in (5, 6):
            newer = make_model("qwen3", seed=seed)
            await engine.update_weights(TensorWeights(newer.state_dict()), version=str(seed))
            generation = await engine.generate(make_request(make_prompt(30), 10))
            assert generation.cached_tokens == 0
            assert worst_difference(newer, make_prompt(30), generation) <= 1e-4


async def test_autograd_notices_an_update(
    make_model: Callable, make_request: Callable, make_prompt: Callable
) -> None:
    model, newer = make_model("llama"), make_model("llama", seed=9)
    async with TransformersEngine(model) as engine:
        await engine.generate(make_request(make_prompt(5)))
        ids = torch.tensor([make_prompt(5)])
        loss = model(input_ids=ids, labels=ids).loss
        await engine.update_weights(TensorWeights(newer.state_dict()), version="1")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
