"""LoRA adapters on a real SGLang of their own: log-probs are peft's, and no adapter answers for another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from backends.engine import AdapterWeights, FolderWeights, Generation, GenerationRequest, SamplingParams
from backends.policy import Policy
from backends.server import make_app
from backends.sglang import CPU_ARGUMENTS, SGLangEngine, SGLangProcess, launch_sglang
from gym_sdk import GymClient
from gym_sdk.errors import CheckpointError, PolicyError, TransportError
from gym_sdk.grpo import LoRASync

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # peft 0.21 asks transformers 5 by the older name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Scores = Callable[..., list[float]]
PROMPT = [5, 17, 42, 108, 9]
TOLERANCE = 1e-4
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARGUMENTS = (
    *CPU_ARGUMENTS,
    *("--max-total-tokens", "16384", "--max-running-requests", "16", "--context-length", "1024"),
    *("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all"),
    *("--lora-backend", "torch_native"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(
    untrained_policy: Path, python: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SGLangProcess]:
    async with launch_sglang(
        untrained_policy,
        python=python,
        arguments=ARGUMENTS,
        log=tmp_path_factory.mktemp("lora") / "sglang.log",
        start_s=120.0,
    ) as process:
        yield process


@pytest_asyncio.fixture(loop_scope="module")
async def lora(server: SGLangProcess, untrained_policy: Path) -> AsyncIterator[SGLangEngine]:
    async with await SGLangEngine.connect(server.url, model=untrained_policy) as engine:
        await engine.update_weights(FolderWeights(untrained_policy), version="0")
        yield engine


def adapted(folder: Path, seed: int, *, modules: list[str] | str = EVERYTHING, rank: int = 4) -> PeftModel:
    """The model with an adapter that changes what it says."""
    base = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def request(name: str, tokens: int = 100, prompt: list[int] = PROMPT) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_new_tokens=tokens))


def worst(
    generation: Generation, forward: Scores, models: Mapping[str, Any], prompt: list[int] = PROMPT
) -> float:
    expected = {
        span.version: forward(models[span.version], prompt, generation, 1.0)
        for span in generation.weight_versions
    }
    return max(
        abs(generation.log_probs[place] - expected[span.version][place])
        for span in generation.weight_versions
        for place in range(span.start, span.end)
    )


async def loaded(engine: SGLangEngine) -> list[str]:
    """The adapters that SGLang has, asked by loading one that cannot be."""
    try:
        await engine._client.post("/unload_lora_adapter", {"lora_name": "nobody"})
    except PolicyError as error:
        return [name for name in str(error).split("'") if "@" in name]
    raise AssertionError("there is an adapter of that name")


async def until_loaded(engine: SGLangEngine, count: int) -> None:
    async with asyncio.timeout(20):
        while len(await loaded(engine)) != count:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("modules", [EVERYTHING, ["q_proj", "v_proj"], ["o_proj", "down_proj"]])
async def test_an_adapter_computes_what_peft_does(
    lora: SGLangEngine, untrained_policy: Path, tmp_path: Path, forward: Scores, modules: list[str]
) -> None:
    model = adapted(untrained_policy, 1, modules=modules)
    await LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path).push(model, version="a1")
    assert lora.info.weight_version == "a1"
    generation = await lora.generate(request("adapted"))
    assert [span.version for span in generation.weight_versions] == ["a1"]
    assert worst(generation, forward, {"a1": model}) < TOLERANCE
    with model.disable_adapter():  # the comparison can tell them apart
        assert worst(generation, forward, {"a1": model}) > 0.1
    pieces = [piece async for piece in lora.stream(request("streamed", 40))]
    assert {piece.weight_version for piece in pieces} == {"a1"}
    assert len(pieces) > 3


async def test_running_requests_finish_on_their_own_adapter_which_then_goes(
    lora: SGLangEngine, untrained_policy: Path, tmp_path: Path, untrained: PreTrainedModel, forward: Scores
) -> None:
    models: dict[str, Any] = {"0": untrained}
    sync = LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path, keep=1)
    tasks = [asyncio.create_task(lora.generate(request("on the base", 300)))]
    await asyncio.sleep(0.2)
    for number in range(1, 4):
        models[f"a{number}"] = adapted(untrained_policy, number)
        await sync.push(models[f"a{number}"], version=f"a{number}")
        tasks.append(asyncio.create_task(lora.generate(request(f"on {number}", 200))))
        await asyncio.sleep(0.1)
    assert lora.info.running >= 3
    generations = [await task for task in tasks]
    versions = [[span.version for span in generation.weight_versions] for generation in generations]
    assert versions == [["0"], ["a1"], ["a2"], ["a3"]]
    for generation in generations:
        assert worst(generation, forward, models) < TOLERANCE
    await until_loaded(lora, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a3"]


async def test_keys_and_values_of_one_adapter_never_serve_another(
    lora: SGLangEngine, untrained_policy: Path, tmp_path: Path, untrained: PreTrainedModel, forward: Scores
) -> None:
    prompt = [*range(5, 105)]
    models: dict[str, Any] = {"0": untrained}
    sync = LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path)
    for version in ("0", "a1", "a2"):
        if version != "0":
            models[version] = adapted(untrained_policy, int(version[1]))
            await sync.push(models[version], version=version)
        first = await lora.generate(request("first", 8, prompt))
        again = await lora.generate(request("again", 8, prompt))
        assert first.cached_tokens == 0
        assert again.cached_tokens > 90
        for generation in (first, again):
            assert [span.version for span in generation.weight_versions] == [version]
            assert worst(generation, forward, models, prompt) < TOLERANCE
    # the same name and the same tensors again: their cache is not that of the first load
    await sync.push(models["a1"], version="a1")
    third = await lora.generate(request("third", 8, prompt))
    assert third.cached_tokens == 0
    assert worst(third, forward, models, prompt) < TOLERANCE


async def test_full_weights_drop_the_adapter_and_end_what_it_samples(
    lora: SGLangEngine, untrained_policy: Path, tmp_path: Path, untrained: PreTrainedModel, forward: Scores
) -> None:
    sync = LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path)
    await sync.push(adapted(untrained_policy, 1), version="a1")
    task = asyncio.create_task(lora.generate(request("flying", 900)))
    await asyncio.sleep(0.3)
    await lora.update_weights(FolderWeights(untrained_policy), version="full")
    with pytest.raises(TransportError, match="dropped") as caught:
        await task
    assert caught.value.retryable
    assert lora.info.weight_version == "full"
    generation = await lora.generate(request("after", 16))
    assert worst(generation, forward, {"full": untrained}) < TOLERANCE
    await until_loaded(lora, 0)


async def test_an_adapter_comes_over_http(
    lora: SGLangEngine, untrained_policy: Path, tmp_path: Path, forward: Scores
) -> None:
    from aiohttp.test_utils import TestServer

    model = adapted(untrained_policy, 5)
    async with TestServer(make_app(Policy(lora, cast(Any, None)))) as server:
        async with GymClient(str(server.make_url("/v1"))) as client:
            await LoRASync(client, tmp_path).push(model, version="http")
            with pytest.raises(PolicyError, match="rank 16"):
                await LoRASync(client, tmp_path).push(adapted(untrained_policy, 6, rank=16), version="big")
    generation = await lora.generate(request("after", 32))
    assert worst(generation, forward, {"http": model}) < TOLERANCE


async def test_a_pause_holds_back_what_then_takes_the_newest_adapter(
    lora: SGLangEngine, untrained_policy: Path, tmp_path: Path, forward: Scores
) -> None:
    model = adapted(untrained_policy, 7)
    await lora.pause("in_place")
    task = asyncio.create_task(lora.generate(request("waits", 16)))
    await asyncio.sleep(0.1)
    await LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path).push(model, version="a7")
    assert not task.done()
    await lora.continue_generation()
    generation = await task
    assert [span.version for span in generation.weight_versions] == ["a7"]
    assert worst(generation, forward, {"a7": model}) < TOLERANCE


async def test_what_sglang_refuses_leaves_the_adapter_before_it(
    lora: SGLangEngine,
    untrained_policy: Path,
    tmp_path: Path,
    forward: Scores,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(untrained_policy, 1)
    sync = LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path)
    await sync.push(model, version="a1")
    monkeypatch.setattr("backends.sglang.weights.adapters.check_adapter", lambda *_: None)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps({"r": 99}))
    with pytest.raises(CheckpointError, match="from before are serving"):
        await lora.update_weights(AdapterWeights(tmp_path / "bad"), version="bad")
    generation = await lora.generate(request("after", 16))
    assert worst(generation, forward, {"a1": model}) < TOLERANCE


async def test_another_clients_weights_below_an_adapter_are_noticed(
    lora: SGLangEngine, server: SGLangProcess, untrained_policy: Path, tmp_path: Path
) -> None:
    await LoRASync(cast(Any, Policy(lora, cast(Any, None))), tmp_path).push(
        adapted(untrained_policy, 1), version="a1"
    )
    async with await SGLangEngine.connect(server.url, model=untrained_policy) as other:
        await other.update_weights(FolderWeights(untrained_policy), version="theirs")
    with pytest.raises(TransportError, match="another client"):
        await lora.generate(request("mixed", 16))
