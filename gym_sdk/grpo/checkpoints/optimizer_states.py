"""The state of an optimizer, and whether it fits another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gym_sdk.errors import CheckpointError

__all__ = ["check_optimizer", "put_back", "state_of"]


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state with what tells whether it fits."""
    return {
        "class": type(optimizer).__name__,
        "trained": _trained(model),
        "groups": _groups(optimizer),
        "settings": _settings(optimizer),
        "state": optimizer.state_dict(),
    }


def check_optimizer(path: Path, saved: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Check that a saved state fits an optimizer of this model.

    Raises:
        CheckpointError: it is of another class, or of other parameters; the message names the first.
    """
    name = type(optimizer).__name__
    if saved["class"] != name:
        raise CheckpointError(
            f"its optimizer is {saved['class']} and this run's is {name}. Resume with the same one; to "
            "change it, load the checkpoint as a model and start anew",
            path=path,
        )
    before, now = saved["trained"], _trained(model)
    for parameter in sorted({*before, *now}):
        then, today = (shapes.get(parameter, "not trained") for shapes in (before, now))
        if then != today:
            raise CheckpointError(
                f"its optimizer is of other parameters: {parameter} is {then} in the checkpoint and {today} "
                "in this run. Train the same parameters",
                path=path,
            )
    if saved["groups"] != _groups(optimizer):
        raise CheckpointError(
            f"its optimizer has groups of {saved['groups']} parameters, and this run's of "
            f"{_groups(optimizer)}. Resume with the configuration that wrote it",
            path=path,
        )
    _check_settings(path, saved["settings"], _settings(optimizer))


def _check_settings(path: Path, before: list[str], now: list[str]) -> None:
    """Tell optimizers apart that one class wraps; a newer torch may have added a setting, or dropped one."""
    gone, new = sorted({*before} - {*now}), sorted({*now} - {*before})
    if gone and new:
        raise CheckpointError(
            f"its optimizer is another one: it has the settings {', '.join(gone)}, and this run's has "
            f"{', '.join(new)} instead. Resume with the same one; to change it, load the checkpoint as a "
            "model and start anew",
            path=path,
        )


def put_back(saved: dict[str, Any], optimizer: Optimizer) -> None:
    """Load a state into an optimizer; the settings of its groups stay this run's."""
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved["state"])
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _trained(model: nn.Module) -> dict[str, list[int]]:
    return {
        name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _groups(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _settings(optimizer: Optimizer) -> list[str]:
    return sorted({name for group in optimizer.param_groups for name in group})
