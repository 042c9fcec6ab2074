"""Adapters on models, and merged models against the models they come from."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import (
    add_lora,
    base_of,
    device_of,
    frozen_twin,
    is_adapter_model,
    merged,
    spare_embedding_gradient,
    trained_parameters,
    vocab_size,
)

Models = Callable[..., PreTrainedModel]
IDS = torch.tensor([[1, 2, 3, 4, 5]])
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disturb(model: nn.Module) -> None:
    """Give an adapter values, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(make_model: Models) -> None:
    model = make_model()
    before = logits(model)
    adapted = add_lora(model, rank=4, alpha=8.0)
    assert torch.equal(logits(adapted), before)
    trained = trained_parameters(adapted)
    assert len(trained) == 2 * 7 * 2  # A and B of the seven matrices of two layers
    assert all("lora_" in name for name in trained)
    assert {parameter.shape[0] for name, parameter in trained.items() if "lora_A" in name} == {4}
    assert adapted.peft_config["default"].lora_alpha / adapted.peft_config["default"].r == 2.0


def test_targets_choose_the_layers(make_model: Models) -> None:
    trained = trained_parameters(add_lora(make_model(), targets=["q_proj", "layers.1.mlp.up_proj"]))
    assert sorted(name.split(".layers.")[1].split(".lora")[0] for name in trained if "lora_A" in name) == [
        "0.self_attn.q_proj",
        "1.mlp.up_proj",
        "1.self_attn.q_proj",
    ]


def test_an_adapter_is_in_float32(make_model: Models) -> None:
    adapted = add_lora(make_model().to(torch.bfloat16))
    assert {parameter.dtype for parameter in trained_parameters(adapted).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha positive"),
        ({"targets": ["q_proj", "query"]}, r"targets name no layers of the model: \['query'\]"),
        ({"targets": []}, "targets name no layers"),
    ],
)
def test_bad_settings_are_refused(make_model: Models, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        add_lora(make_model(), **values)


def test_adapters_upon_adapters_are_refused(make_model: Models) -> None:
    with pytest.raises(ConfigurationError, match="has adapters already"):
        add_lora(add_lora(make_model()))  # type: ignore[arg-type]


def test_both_kinds_answer_alike(make_model: Models) -> None:
    model = make_model(vocab=24)
    assert not is_adapter_model(model)
    assert base_of(model) is model
    adapted = add_lora(model)
    assert is_adapter_model(adapted)
    assert base_of(adapted) is model
    for each in (model, adapted):
        assert vocab_size(each) == 24
        assert device_of(each) == torch.device("cpu")


def test_adapters_by_transformers_are_refused(make_model: Models) -> None:
    model = make_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigurationError, match="add_lora"):
        base_of(model)


def test_without_peft_the_way_out_is_said(make_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # Python's own mark of a package that cannot be imported
    assert not is_adapter_model(make_model())
    with pytest.raises(ConfigurationError, match=r'pip install "gym-sdk\[lora\]"'):
        add_lora(make_model())


def test_a_twin_shares_or_copies(make_model: Models) -> None:
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    live, fixed = frozen_twin(model, copy_trained=False), frozen_twin(model, copy_trained=True)
    before = logits(model)
    for twin in (live, fixed):
        assert torch.equal(logits(twin), before)
        assert not any(parameter.requires_grad for parameter in twin.parameters())
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        same = [dict(twin.named_parameters())[name].data_ptr() for twin in (live, fixed)]
        assert same[0] == parameter.data_ptr()
        assert (same[1] == parameter.data_ptr()) is not parameter.requires_grad
    disturb(model)
    assert torch.equal(logits(live), logits(model))
    assert torch.equal(logits(fixed), before)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 13


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen3", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ],
)
def test_a_merged_model_is_the_adapted_one(
    make_model: Models, architecture: str, options: dict[str, Any]
) -> None:
    adapted = get_peft_model(make_model(architecture), LoraConfig(r=4, **options)).eval()
    untouched = logits(adapted)
    disturb(adapted)
    before, expected = values(adapted), logits(adapted)
    assert not torch.allclose(expected, untouched, atol=0.1)

    weights = merged(adapted).state_dict()
    fresh = make_model(architecture, seed=9)
    fresh.load_state_dict(weights)
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-4, atol=1e-5)
    after = adapted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(adapted), expected)
    again = merged(adapted).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_merged_bfloat16_model_is_rounded_once(make_model: Models) -> None:
    adapted = add_lora(make_model().to(torch.bfloat16), rank=4, alpha=8.0)
    disturb(adapted)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weights = merged(adapted).state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    expected = (layer.weight.float() + delta).to(torch.bfloat16)
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], expected)


def test_a_merged_model_can_be_saved(make_model: Models, tmp_path: Path) -> None:
    adapted = add_lora(make_model())
    disturb(adapted)
    merged(adapted).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(adapted), rtol=1e-4, atol=1e-5)


def test_merging_leaves_training_as_it_was(make_model: Models) -> None:
    adapted = add_lora(make_model())
    disturb(adapted)
    loss = adapted(input_ids=IDS).logits.sum()
    merged(adapted)
    loss.backward()  # the graph's tensors have not been changed
    assert all(parameter.grad is not None for parameter in trained_parameters(adapted).values())


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapted_end_of_a_tied_model_is_not_merged(make_model: Models, options: dict[str, Any]) -> None:
    adapted = get_peft_model(make_model("qwen3"), LoraConfig(r=2, **options))
    with pytest.raises(ConfigurationError, match="tied to the vocabulary projection"):
        merged(adapted)


def test_what_cannot_be_merged_is_refused(make_model: Models) -> None:
    with pytest.raises(ConfigurationError, match="no adapters to merge"):
        merged(make_model())  # type: ignore[arg-type]
    adapted = add_lora(make_model())
    disturb(adapted)
    adapted.merge_adapter()
    with pytest.raises(ConfigurationError, match="unmerge_adapter"):
        merged(adapted)


def test_nothing_to_train_is_refused(make_model: Models, tmp_path: Path) -> None:
    add_lora(make_model()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    with pytest.raises(ConfigurationError, match="is_trainable=True"):
        trained_parameters(loaded)
    assert trained_parameters(PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_only_a_tied_embedding_makes_a_sparse_gradient(make_model: Models, architecture: str) -> None:
    """Its gradient is added to the dense one of the vocabulary projection, so the weight's stays dense."""
    model = make_model(architecture)
    twin = copy.deepcopy(model)
    spare_embedding_gradient(model)
    assert model.get_input_embeddings().sparse == (architecture == "qwen3")
    for one in (model, twin):
        one(input_ids=torch.arange(1, 9)[None]).logits.log_softmax(-1)[0, :, 3].sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert actual.grad.layout == torch.strided, name
        torch.testing.assert_close(actual.grad, expected.grad)
