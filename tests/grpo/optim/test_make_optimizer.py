"""Optimisers over real models: against torch's own, and after a save and a load."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import add_lora
from gym_sdk.grpo.optim import CompositeOptimizer, MasterWeights, OptimizerConfig, make_optimizer

Models = Callable[..., PreTrainedModel]
NAMES = ["adamw", "adafactor", "sgd", "muon"]


def backward(model: nn.Module, step: int) -> None:
    ids = torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids).logits.float().log_softmax(-1)[..., 0].sum().backward()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / step
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def require_equal(first: nn.Module, second: nn.Module) -> None:
    expected = weights(second)
    for name, value in weights(first).items():
        assert torch.equal(value, expected[name]), name


def require_close(first: nn.Module, second: nn.Module) -> None:
    """Check weights that were updated by other kernels of the same formula."""
    expected = weights(second)
    for name, value in weights(first).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(
    make_model: Models, name: Any, dtype: torch.dtype
) -> None:
    momentum = 0.9 if name == "sgd" else None
    config = OptimizerConfig(name=name, weight_decay=0.1, momentum=momentum)
    model = make_model("llama").to(dtype)
    optimizer = make_optimizer(model, config)
    train(model, optimizer, range(1, 4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    train(model, optimizer, range(4, 7))

    saved = torch.load(file, weights_only=True)
    resumed = make_model("llama", seed=1).to(dtype)
    other = make_optimizer(resumed, config)
    train(resumed, other, range(1, 2))  # a state of its own, to be replaced
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(4, 7))
    require_equal(resumed, model)


def decays(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            OptimizerConfig(betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.1),
            lambda model: AdamW(decays(model, 0.1), betas=(0.8, 0.9), eps=1e-3),
        ),
        (
            OptimizerConfig(name="adafactor", weight_decay=0.1),
            lambda model: Adafactor(decays(model, 0.1)),
        ),
        (OptimizerConfig(name="sgd", momentum=0.9), lambda model: SGD(model.parameters(), momentum=0.9)),
        (OptimizerConfig(name="sgd"), lambda model: SGD(model.parameters())),
    ],
)
def test_settings_reach_torch(
    make_model: Models, config: OptimizerConfig, expected: Callable[[nn.Module], Optimizer]
) -> None:
    model, other = make_model(), make_model()
    train(model, make_optimizer(model, config), range(1, 4))
    train(other, expected(other), range(1, 4))
    require_close(model, other)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(make_model: Models, architecture: str) -> None:
    model, other = make_model(architecture), make_model(architecture)
    optimizer = make_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.1, momentum=0.8))
    assert isinstance(optimizer, CompositeOptimizer)
    train(model, optimizer, range(1, 4))

    hidden = {name: p for name, p in other.named_parameters() if name.endswith("_proj.weight")}
    rest = {name: p for name, p in other.named_parameters() if name not in hidden}
    assert len(hidden) == 14
    assert {name for name, p in rest.items() if p.ndim == 2} <= {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    muon = Muon(hidden.values(), weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [
            {"params": [p for p in rest.values() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in rest.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(1, 4):
        other.zero_grad()
        backward(other, step)
        for part in (muon, adamw):
            for group in part.param_groups:
                group["lr"] = 1e-3 / step
            part.step()
    require_close(model, other)


def test_a_composite_refuses_a_parameter_of_two_parts() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        CompositeOptimizer(SGD([parameter]), AdamW([parameter]))


def test_muon_alone_trains_an_adapter(make_model: Models) -> None:
    model = add_lora(make_model(), rank=2)
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"))
    assert isinstance(optimizer, Muon)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2 * 14


def test_every_trained_parameter_is_there_once(make_model: Models) -> None:
    model = make_model()  # embedding and vocabulary projection are one
    model.model.layers[0].requires_grad_(False)
    groups = make_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
    owned = [parameter for group in groups for parameter in group["params"]]
    assert len(owned) == len(set(owned)) == sum(p.requires_grad for p in model.parameters())
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [
        (0.5, {2}),
        (0.0, {1}),
    ]
    assert {group["lr"] for group in groups} == {1e-6}


def test_your_own_optimizer_gets_groups_and_master_weights(make_model: Models) -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = make_optimizer(
        model,
        OptimizerConfig(learning_rate=1e-3),
        factory=lambda groups: torch.optim.NAdam(groups, momentum_decay=0.1),
    )
    assert isinstance(optimizer, MasterWeights)
    before = weights(model)
    train(model, optimizer, range(1, 3))
    assert {group["momentum_decay"] for group in optimizer.param_groups} == {0.1}
    assert not torch.equal(weights(model)["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_nothing_to_train_is_refused(make_model: Models) -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        make_optimizer(model, OptimizerConfig())
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ConfigurationError, match="choose 'adamw'"):
        make_optimizer(model, OptimizerConfig(name="muon"))


def test_a_state_of_other_parameters_is_refused(make_model: Models) -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"))
    state = copy.deepcopy(optimizer.state_dict())
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="doesn't match the size"):
        make_optimizer(model, OptimizerConfig(name="muon")).load_state_dict(state)
