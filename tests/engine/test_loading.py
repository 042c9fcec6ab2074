from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from backends.transformers import EngineConfig, TransformersEngine
from gym_sdk.errors import CheckpointError, ConfigurationError


@pytest.mark.asyncio
async def test_a_folder_round_trip(
    model: PreTrainedModel,
    tmp_path: Path,
    make_request: Callable,
    make_prompt: Callable,
    worst_difference: Callable,
) -> None:
    model.save_pretrained(tmp_path)
    config = EngineConfig(context_length=100)
    engine = TransformersEngine.from_folder(
        tmp_path, device="cpu", dtype=torch.float32, config=config, weight_version="v1"
    )
    async with engine:
        info = engine.info
        assert (info.vocab_size, info.context_length, info.weight_version) == (97, 100, "v1")
        generation = await engine.generate(make_request(make_prompt(20), 20))
    assert worst_difference(model, make_prompt(20), generation) <= 1e-4
    assert generation.weight_versions[0].version == "v1"


def test_a_folder_without_a_model_is_refused(tmp_path: Path, make_model: Callable) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        TransformersEngine.from_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="no-such-model"):
        TransformersEngine.from_folder(tmp_path)
    make_model("qwen3").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot load"):
        TransformersEngine.from_folder(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, make_model: Callable) -> None:
    model = make_model("llama")
    kept = {name: tensor for name, tensor in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(CheckpointError, match=r"lacks .*q_proj"):
        TransformersEngine.from_folder(tmp_path)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path, make_model: Callable) -> None:
    make_model("llama").save_pretrained(tmp_path)
    make_model("llama", hidden_size=48).config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load"):
        TransformersEngine.from_folder(tmp_path)


def test_a_context_longer_than_the_models_is_refused(qwen3: PreTrainedModel) -> None:
    with pytest.raises(ConfigurationError, match="257; the model is made for 256"):
        TransformersEngine(qwen3, config=EngineConfig(context_length=257))
    with pytest.raises(ConfigurationError, match="less than one row"):
        TransformersEngine(qwen3, config=EngineConfig(max_cache_tokens=255))


@pytest.mark.asyncio
async def test_another_architecture_with_absolute_positions(
    make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4)
    model = GPT2LMHeadModel(config).eval()
    async with TransformersEngine(model) as engine:
        generation = await engine.generate(make_request(make_prompt(20), 20))
    assert worst_difference(model, make_prompt(20), generation) <= 1e-4


@pytest.mark.asyncio
async def test_a_sliding_window_is_served_up_to_its_size(
    make_request: Callable, make_prompt: Callable, worst_difference: Callable
) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.4,
    }
    model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=64, max_position_embeddings=256)).eval()
    with pytest.raises(ConfigurationError, match="only up to 64 tokens"):
        TransformersEngine(model)
    async with TransformersEngine(model, config=EngineConfig(context_length=64)) as engine:
        generation = await engine.generate(make_request(make_prompt(20), None))
    assert worst_difference(model, make_prompt(20), generation) <= 1e-4


def test_other_kinds_of_model_are_refused(make_model: Callable) -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigurationError, match="Mamba"):
        TransformersEngine(mamba, config=EngineConfig(context_length=64))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ConfigurationError, match="not a causal language model"):
        TransformersEngine(t5, config=EngineConfig(context_length=64))


def test_attention_that_computes_something_else_is_refused(make_model: Callable) -> None:
    class Twisted(LlamaForCausalLM):
        """Standard layers, but what attention sees is not what the plain model sees."""

        def forward(self, *args: object, **keywords: object) -> object:  # type: ignore[override]
            if "slot_batch" in keywords:
                keywords["position_ids"] = keywords["position_ids"] * 2  # type: ignore[operator]
            return super().forward(*args, **keywords)

    twisted = Twisted(make_model("llama").config)
    twisted.load_state_dict(make_model("llama").state_dict())
    with pytest.raises(ConfigurationError, match="computes other logits"):
        TransformersEngine(twisted)
