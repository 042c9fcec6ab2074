"""Autocast, and layers that are computed again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import add_lora
from gym_sdk.grpo.optim import autocast, enable_gradient_checkpointing

Models = Callable[..., PreTrainedModel]
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])


def test_bfloat16_computes_in_it_and_keeps_gradients_in_float32(make_model: Models) -> None:
    model = make_model()
    exact = model(input_ids=IDS).logits
    with autocast("cpu", "bfloat16"):
        logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1)
    logits.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_float32_holds_inside_another_autocast(make_model: Models) -> None:
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast("cpu", "float32"):
        logits = model(input_ids=IDS).logits
    assert torch.equal(logits, model(input_ids=IDS).logits)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not 'float16'"):
        autocast("cpu", "float16")  # type: ignore[arg-type]


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return logits, gradients, and how many bytes were kept for the backward pass."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=IDS, use_cache=False).logits
        loss = logits.log_softmax(-1)[..., 0].sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_gradients_are_the_same_and_less_is_kept(
    make_model: Models, architecture: str, adapted: bool
) -> None:
    model: Any = make_model(architecture, layers=4)
    if adapted:
        model = add_lora(model, rank=4).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    logits, gradients, kept = run(model)
    enable_gradient_checkpointing(model)
    enable_gradient_checkpointing(model)
    same_logits, same_gradients, less = run(model)
    assert torch.equal(logits, same_logits)
    assert gradients.keys() == same_gradients.keys() != set()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name
    assert less < 0.5 * kept


def test_dropout_stays_as_the_mode_says() -> None:
    model = OPTForCausalLM(  # drops out between the layers' own lines, not only in their modules
        OPTConfig(
            vocab_size=16,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            max_position_embeddings=16,
            word_embed_proj_dim=32,
            dropout=0.5,
            layerdrop=0.0,
        )
    )
    results = []
    for _ in range(2):
        evaluated = run(model.eval())[0]
        torch.manual_seed(0)
        trained, gradients, _ = run(model.train())
        results.append([evaluated, trained, *(gradient.clone() for gradient in gradients.values())])
        assert not torch.equal(evaluated, trained)
        enable_gradient_checkpointing(model)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_a_cache_is_filled_once(make_model: Models) -> None:
    model = make_model()
    expected = model(input_ids=IDS).logits[:, -1]
    enable_gradient_checkpointing(model)
    cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
    logits = model(input_ids=IDS[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert cache.get_seq_length() == IDS.shape[1]


def test_a_copy_of_the_model_has_layers_of_its_own(make_model: Models) -> None:
    model = make_model()
    enable_gradient_checkpointing(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert not torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    run(twin)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Linear does not support gradient checkpointing"):
        enable_gradient_checkpointing(nn.Linear(2, 2))  # type: ignore[arg-type]
