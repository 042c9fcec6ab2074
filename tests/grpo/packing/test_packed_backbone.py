"""Packed = padded = each row alone: hidden states and the gradients of all parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peft import LoraConfig, get_peft_model
from support.packed_rows import (
    assert_equal,
    make_exact,
    make_family,
    make_row,
    measure,
    measure_alone,
    row_families,
)
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.optim import enable_gradient_checkpointing
from gym_sdk.grpo.packing import check_packing, hidden_before, pack_rows, to_tensors
from gym_sdk.tokens import TokenSequence

Models = Callable[..., PreTrainedModel]
SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_all_layouts_equal_each_row_alone(
    make_model: Models, architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    rows = make_family()
    expected = measure_alone(make_exact(make_model(architecture)), rows)
    model = make_model(architecture)
    model = make_exact(model) if dtype == torch.float64 else model
    assert len(pack_rows(rows).input_ids) < len(pack_rows(rows, share_prefixes=False).input_ids)
    for batch in (pack_rows(rows), pack_rows(rows, share_prefixes=False), to_tensors(rows)):
        assert_equal(measure(model, batch), expected, tolerance)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=row_families())
def test_random_forests_equal_each_row_alone(make_model: Models, rows: list[TokenSequence]) -> None:
    model = make_exact(make_model())
    if any(any(row.loss_mask) for row in rows):
        assert_equal(measure(model, pack_rows(rows)), measure_alone(model, rows), 1e-13)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same(make_model: Models, use_reentrant: bool) -> None:
    model, rows = make_exact(make_model()).train(), make_family()
    expected = measure(model, pack_rows(rows))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    layers = []
    hook = model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: layers.append(0))
    actual = measure(model, pack_rows(rows))
    hook.remove()
    assert len(layers) == 2  # the second time in the backward pass
    assert_equal(actual, expected, 1e-14)
    assert_equal(measure(model, to_tensors(rows)), measure_alone(model, rows), 1e-13)


def test_this_trainers_own_checkpointing_computes_the_same(make_model: Models) -> None:
    model, rows = make_exact(make_model()), make_family()
    expected = measure(model, pack_rows(rows))
    enable_gradient_checkpointing(model)
    assert_equal(measure(model, pack_rows(rows)), expected, 1e-14)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks the old name
def test_adapters(make_model: Models) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model, rows = make_exact(get_peft_model(make_model(), config)), make_family()
    expected = measure_alone(model, rows)
    assert len(expected[1]) == 12
    assert_equal(measure(model, pack_rows(rows)), expected, 1e-13)
    check_packing(model)


def test_autocast(make_model: Models) -> None:
    model, rows = make_model(), make_family()
    expected = measure_alone(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(measure(model, pack_rows(rows)), expected, 5e-2)


def test_the_model_is_left_as_it_was(make_model: Models) -> None:
    model = make_model()
    model.activation_checkpointing_enable()
    backbone = model.get_decoder()
    before = model.config._attn_implementation, backbone.layers[0]._gradient_checkpointing_func
    hidden_before(backbone, pack_rows(make_family()))
    assert (model.config._attn_implementation, backbone.layers[0]._gradient_checkpointing_func) == before
    backbone.layers[1].self_attn.is_causal = False
    with pytest.raises(ConfigurationError, match=r"both directions.*pack=False"):
        hidden_before(backbone, pack_rows(make_family()))
    assert (model.config._attn_implementation, backbone.layers[0]._gradient_checkpointing_func) == before


def test_a_batch_that_trains_nothing_has_a_gradient_of_zero(make_model: Models) -> None:
    model = make_model()
    hidden = hidden_before(model.get_decoder(), pack_rows([make_row([1, 2, 3], [0, 0, 0])]))
    assert hidden.shape == (0, 32)
    hidden.sum().backward()
    gradients = [parameter.grad for parameter in model.get_decoder().parameters()]
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_models_that_pass_the_check(make_model: Models, architecture: str) -> None:
    model = make_model(architecture).train()
    check_packing(model)
    check_packing(make_model(architecture).bfloat16())
    assert model.training


def test_sliding_windows_are_refused_where_they_matter() -> None:
    def model(window: int) -> PreTrainedModel:
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()

    check_packing(model(64))
    with pytest.raises(ConfigurationError, match=r"a sliding window of 32 tokens.*pack=False"):
        check_packing(model(32))


def test_soft_caps_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"soft-capped scores.*pack=False"):
        check_packing(Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval())


def test_attention_dropout_is_refused(make_model: Models) -> None:
    model = make_model().train()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    check_packing(model)  # which takes none
    with pytest.raises(ConfigurationError, match="attention dropout"):
        hidden_before(model.get_decoder(), pack_rows(make_family()))


def test_models_that_mix_tokens_otherwise_are_found_by_the_numbers() -> None:
    config = FalconMambaConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, state_size=4, use_mambapy=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kernels that are not installed
        model = FalconMambaForCausalLM(config).eval()
        with pytest.raises(ConfigurationError, match=r"other hidden states.*pack=False"):
            check_packing(model)


def test_models_that_do_not_hand_arguments_on_are_refused(make_model: Models) -> None:
    model = make_model()
    attention = model.get_decoder().layers[1].self_attn
    attend = attention.forward
    attention.forward = lambda *args, forest, **kwargs: attend(*args, **kwargs)
    with pytest.raises(ConfigurationError, match=r"not handed its model's keyword arguments.*pack=False"):
        check_packing(model)


def test_attention_of_another_kind_is_found_by_the_numbers(make_model: Models) -> None:
    model = make_model()
    attention = model.get_decoder().layers[1].self_attn
    foreign = copy.deepcopy(attention)  # with a config of its own, as code that does not ask the registry
    attention.forward = foreign.forward
    with pytest.raises(ConfigurationError, match=r"other hidden states.*pack=False"):
        check_packing(model)
