"""Weight updates: checked as a whole before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backends.engine import FolderWeights, TensorWeights, WeightSource
from backends.transformers.loading import read_tensors
from gym_sdk.errors import CheckpointError, ConfigurationError

__all__ = ["WeightStage"]


class WeightStage:
    """New weights for a module, found to fit and brought to its device and type.

    A complete set is needed, so that no update leaves a mixture of two versions; of names that are tied to
    one parameter, one is enough. An empty `TensorWeights` is an update that has already happened in place.

    Args:
        module: whose parameters and persistent buffers to replace.
        source: where the tensors come from.

    Raises:
        CheckpointError: the source cannot be read, or names or shapes differ.
        ConfigurationError: it is neither a folder nor tensors.
    """

    def __init__(self, module: nn.Module, source: WeightSource) -> None:
        if isinstance(source, FolderWeights):
            where, tensors = str(source.path), dict(read_tensors(source.path))
            complete = True
        elif not isinstance(source, TensorWeights):
            raise ConfigurationError(
                f"the embedded engine takes no {type(source).__name__}; push full weights, adapters merged, "
                "as tensors (TensorSync) or as a folder (FolderSync)"
            )
        else:
            where, tensors = "tensors", dict(source.tensors)
            complete = bool(tensors)
        self._pairs = _paired(module, tensors, where) if complete else []

    def apply(self) -> None:
        """Write the weights into the module."""
        # not in inference mode: autograd must notice that what it saved has changed
        with torch.inference_mode(False), torch.no_grad():
            for target, new in self._pairs:
                target.copy_(new)


def _paired(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> list[tuple[Tensor, Tensor]]:
    targets = module.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, target in targets.items():
        tied.setdefault(id(target), []).append(name)
    problems = [f"unknown name {name}" for name in sorted(tensors.keys() - targets.keys())]
    pairs = []
    for names in tied.values():
        target = targets[names[0]]
        given = [name for name in names if name in tensors]
        if not given:
            problems.append(f"{names[0]} is missing")
            continue
        wrong = [name for name in given if tensors[name].shape != target.shape]
        problems += [
            f"{name} has shape {list(tensors[name].shape)}, the model's has {list(target.shape)}"
            for name in wrong
        ]
        first = tensors[given[0]]
        if not wrong and any(not torch.equal(first, tensors[name]) for name in given[1:]):
            problems.append(f"{' and '.join(given)} are tied in the model and differ here")
        pairs.append((target, first))
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(f"does not fit the model: {'; '.join(problems[:5])}{more}", path=where)
    return [(target, new.detach().to(target.device, target.dtype)) for target, new in pairs]
