"""From a model and settings to an optimiser over what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import base_of, trained_parameters
from gym_sdk.grpo.optim.composite import CompositeOptimizer
from gym_sdk.grpo.optim.config import OptimizerConfig
from gym_sdk.grpo.optim.master import MasterWeights, masters_of

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["OptimizerFactory", "make_optimizer"]

_Groups = list[dict[str, Any]]
OptimizerFactory = Callable[[_Groups], Optimizer]
"""Makes an optimiser of your own from parameter groups, each with `params`, `lr` and `weight_decay`."""


def make_optimizer(
    model: PreTrainedModel | PeftModel, config: OptimizerConfig, *, factory: OptimizerFactory | None = None
) -> Optimizer:
    """Make an optimiser over the parameters that have `requires_grad`, each of them once.

    The learning rate of its groups is the schedule's peak; whoever steps it sets `lr` from
    `config.learning_rate_at(step)` before. If parameters are of lower precision than float32, they are
    updated through float32 copies (see `MasterWeights`).

    Args:
        model: its parameters, on their device, with the weights that training starts from.
        config: the settings.
        factory: makes the optimiser instead of `config.name`, whose own settings then have no effect.

    Returns:
        An optimiser whose `state_dict` holds all that the next step depends on, besides the model.

    Raises:
        ConfigurationError: the model has nothing to train, or nothing for Muon, or torch has no Muon.
    """
    trained = list(trained_parameters(model).values())
    masters = masters_of(trained)
    if factory is not None:
        optimizer = factory(_groups(trained, masters, config))
    elif config.name == "muon":
        optimizer = _muon(model, trained, masters, config)
    else:
        optimizer = _plain(_groups(trained, masters, config), config)
    return MasterWeights(optimizer, masters) if masters else optimizer


def _plain(groups: _Groups, config: OptimizerConfig) -> Optimizer:
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.effective_momentum)
    return _adamw(groups, config)


def _adamw(groups: _Groups, config: OptimizerConfig) -> Optimizer:
    # torch's own choice is a loop on CPUs, which took 4 times as long; on GPUs, a kernel for each operation
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.epsilon, fused=fused)


def _muon(
    model: PreTrainedModel | PeftModel,
    trained: Sequence[nn.Parameter],
    masters: Mapping[nn.Parameter, Tensor],
    config: OptimizerConfig,
) -> Optimizer:
    """Muon for the matrices between embedding and vocabulary projection, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigurationError(
            f"optimizer 'muon' needs a newer torch than {torch.__version__}, which has no torch.optim.Muon"
        )
    outer: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = base_of(model).get_output_embeddings()
    if isinstance(head, nn.Module):
        outer.append(head)
    excluded = {id(parameter) for module in outer for parameter in module.parameters()}
    hidden = [p for p in trained if p.ndim == 2 and id(p) not in excluded]
    chosen = {id(parameter) for parameter in hidden}
    rest = [p for p in trained if id(p) not in chosen]
    if not hidden:
        raise ConfigurationError(
            "optimizer 'muon' updates the matrices of hidden layers, and none of them has requires_grad; "
            "choose 'adamw'"
        )
    muon = torch.optim.Muon(
        _groups(hidden, masters, config),
        momentum=config.effective_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    if not rest:
        return muon
    return CompositeOptimizer(muon, _adamw(_groups(rest, masters, config), config))


def _groups(
    parameters: Sequence[nn.Parameter], masters: Mapping[nn.Parameter, Tensor], config: OptimizerConfig
) -> _Groups:
    """Return what decays and what does not, if there is any of it; masters stand for their parameters."""
    decaying = [masters.get(p, p) for p in parameters if p.ndim >= 2]
    others = [masters.get(p, p) for p in parameters if p.ndim < 2]
    return [
        {"params": params, "lr": config.learning_rate, "weight_decay": decay}
        for params, decay in ((decaying, config.weight_decay), (others, 0.0))
        if params
    ]
