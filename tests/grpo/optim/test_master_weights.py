"""Low-precision weights that are updated through float32 copies."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import add_lora
from gym_sdk.grpo.optim import MasterWeights, OptimizerConfig, make_optimizer

Models = Callable[..., PreTrainedModel]


def set_gradients(model: PreTrainedModel, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        # mostly of one sign, as a gradient that points somewhere
        parameter.grad = 1.0 + 0.5 * torch.randn(parameter.shape, generator=generator)


def masters(optimizer: MasterWeights) -> list[Tensor]:
    saved = optimizer.state_dict()["master_weights"]
    assert isinstance(saved, list)
    return saved


def test_small_updates_add_up_as_in_float32(make_model: Models) -> None:
    model = make_model(layers=1).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    start = copy.deepcopy(model)
    config = OptimizerConfig(learning_rate=1e-6)
    optimizer, reference = make_optimizer(model, config), make_optimizer(exact, config)
    assert isinstance(optimizer, MasterWeights)

    def changed() -> float:
        pairs = list(zip(model.parameters(), start.parameters(), strict=True))
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    moved_at_first = 0.0
    for step in range(1, 301):
        set_gradients(model, step)
        set_gradients(exact, step)
        optimizer.step()
        reference.step()
        moved_at_first = moved_at_first or changed()
    for master, parameter, expected in zip(
        masters(optimizer), model.parameters(), exact.parameters(), strict=True
    ):
        assert torch.equal(master, expected)
        assert torch.equal(parameter, expected.to(torch.bfloat16))
    assert moved_at_first < 0.02
    assert changed() > 0.3

    # without copies, the same updates are lost to rounding
    plain = torch.optim.AdamW(start.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in start.parameters()]
    for step in range(1, 301):
        set_gradients_low(start, step)
        plain.step()
    lost = sum(int((a == b).sum()) for a, b in zip(start.parameters(), before, strict=True))
    assert lost / sum(b.numel() for b in before) > 0.95


def set_gradients_low(model: PreTrainedModel, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = (1.0 + 0.5 * torch.randn(parameter.shape, generator=generator)).bfloat16()


def test_gradients_are_accumulated_in_float32(make_model: Models) -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = make_optimizer(model, OptimizerConfig())
    weight = model.model.norm.weight
    for scale in [1.0] + [2.0**-10] * 16:
        (weight * scale).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full(weight.shape, 1.0 + 2.0**-6))  # in bfloat16, 1.0
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_can_be_zeroed_in_place(make_model: Models) -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = make_optimizer(model, OptimizerConfig())
    model.model.norm.weight.sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert model.model.norm.weight.grad.count_nonzero() == 0


def test_a_parameter_without_gradient_stays(make_model: Models) -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.1))
    before = model.model.embed_tokens.weight.detach().clone()
    model.model.norm.weight.sum().backward()
    optimizer.step()
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert (model.model.norm.weight < 1.0).all()


def test_only_what_is_trained_in_low_precision_is_copied(make_model: Models) -> None:
    adapted = add_lora(make_model().to(torch.bfloat16))
    assert not isinstance(make_optimizer(adapted, OptimizerConfig()), MasterWeights)
    model = make_model().to(torch.bfloat16)
    model.model.norm.float()
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.1))
    assert isinstance(optimizer, MasterWeights)
    assert len(masters(optimizer)) == len(list(model.parameters())) - 1
    model.model.norm.weight.sum().backward()
    optimizer.step()
    assert (model.model.norm.weight < 1.0).all()


def test_loading_brings_the_weights_too(make_model: Models) -> None:
    model = make_model().to(torch.bfloat16)
    state = copy.deepcopy(make_optimizer(model, OptimizerConfig()).state_dict())
    other = make_model(seed=1).to(torch.bfloat16)
    make_optimizer(other, OptimizerConfig()).load_state_dict(state)
    for loaded, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, expected)


def test_a_state_that_does_not_fit_is_refused(make_model: Models) -> None:
    model = make_model()
    state = make_optimizer(model, OptimizerConfig()).state_dict()
    low = make_model().to(torch.bfloat16)
    optimizer = make_optimizer(low, OptimizerConfig())
    with pytest.raises(ConfigurationError, match="no master weights"):
        optimizer.load_state_dict(state)
    wider = make_optimizer(make_model(hidden=64).to(torch.bfloat16), OptimizerConfig())
    with pytest.raises(ConfigurationError, match="other parameters"):
        optimizer.load_state_dict(wider.state_dict())
