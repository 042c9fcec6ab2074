"""Writing a checkpoint and reading it back: a model's folder, and `trainer/` in it for the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gym_sdk.errors import CheckpointError, ConfigurationError
from gym_sdk.grpo.checkpoints.adapters import (
    ADAPTER_CONFIG,
    adapter_tensors,
    read_adapter,
    save_adapter,
)
from gym_sdk.grpo.checkpoints.comparing import short
from gym_sdk.grpo.checkpoints.folders import copy_tokenizer, new_folder, previous_of, save_model
from gym_sdk.grpo.checkpoints.full_models import read_full_model
from gym_sdk.grpo.checkpoints.manifest import MANIFEST, check_files, write_manifest
from gym_sdk.grpo.checkpoints.optimizer_states import (
    check_optimizer,
    put_back,
    state_of,
)
from gym_sdk.grpo.checkpoints.random_states import random_states, set_random_states
from gym_sdk.grpo.checkpoints.replay import read_replay, write_replay
from gym_sdk.grpo.checkpoints.state import TrainerState, read_state, write_state
from gym_sdk.grpo.models import is_adapter_model
from gym_sdk.schema import Group

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Checkpoint", "Model", "read_checkpoint", "write_checkpoint"]

Model: TypeAlias = "PreTrainedModel | PeftModel"

_STATES = "trainer/state.pt"
_SCALARS = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and found to fit; nothing has been changed yet.

    Attributes:
        state: where the run stood.
        extra: what was given as `extra`, on the CPU.
        replay: the groups of each batch of tasks, by its position.
    """

    state: TrainerState
    extra: dict[str, Any]
    replay: dict[int, list[Group]]
    _weights: dict[str, Tensor]
    _optimizer: dict[str, Any]
    _random: dict[str, Any]

    def apply(self, model: Model, optimizer: Optimizer) -> None:
        """Put weights, optimizer and random states back; call it once, on what it was read for.

        The optimizer's moments are the checkpoint's; the settings of its groups (learning rate, decay, ...)
        stay this run's.
        """
        tensors = adapter_tensors(model) if is_adapter_model(model) else model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self._weights[name])
        put_back(self._optimizer, optimizer)
        set_random_states(self._random)


def write_checkpoint(
    path: Path,
    model: Model,
    state: TrainerState,
    *,
    optimizer: Optimizer,
    extra: Mapping[str, Any] | None = None,
    replay: Mapping[int, Sequence[Group]] | None = None,
    random: Mapping[str, Any] | None = None,
    tokenizer_dir: Path | None = None,
) -> None:
    """Write a checkpoint: a model folder that any tool loads, and `trainer/` in it to resume exactly.

    It is on the disk when this returns, and appears whole or not at all. One at the same path is replaced,
    and stays whole if this fails.

    Args:
        path: the checkpoint's folder.
        model: saved whole; of a peft model its active adapter alone.
        state: where the run stands.
        optimizer: its state is saved.
        extra: states of anything else (reference policy, moving average, ...) by name: tensors, numbers, text
            and None in dicts, lists and tuples.
        replay: finished groups that were not trained on yet, by the position of their batch of tasks.
        random: what `random_states` returned at the moment that the run resumes from; None: now.
        tokenizer_dir: a model folder whose tokenizer files are copied into the checkpoint.

    Raises:
        ConfigurationError: `extra` or `state` has what cannot be read back, or a parameter is trained that an
            adapter's file does not hold.
        CheckpointError: it cannot be written, e.g. because the disk is full.
    """
    extra = dict(extra or {})
    _require_loadable(extra, "extra")
    try:
        with new_folder(path, durable=True) as folder:
            own = folder / "trainer"
            own.mkdir()
            if is_adapter_model(model):
                save_adapter(model, folder)
            else:
                save_model(cast(PreTrainedModel, model), folder)
            write_state(folder, state)
            states = {
                "optimizer": state_of(model, optimizer),
                "random": dict(random or random_states()),
                "extra": extra,
            }
            torch.save(states, folder / _STATES)
            write_replay(folder, replay or {})
            write_manifest(folder)
            if tokenizer_dir is not None:  # not in the manifest: a template may be edited later
                copy_tokenizer(tokenizer_dir, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save: a full disk is a RuntimeError
        raise CheckpointError(
            f"cannot be written: {short(error)}. What was there before is whole; make room or choose another "
            "folder, and save again",
            path=path,
        ) from error


def read_checkpoint(path: Path, model: Model, optimizer: Optimizer) -> Checkpoint:
    """Read a checkpoint and check that it fits the model and its optimizer, without changing anything.

    If a kill left only the predecessor of the folder (see `new_folder`), that is read. Memory: the weights
    and the optimizer's state once more, on the CPU.

    Raises:
        CheckpointError: there is none, a file is missing or damaged, or it is of another model, adapter or
            optimizer; the message names the file, setting or parameter at fault and the way out.
    """
    if not path.exists() and previous_of(path).exists():
        path = previous_of(path)
    state = _checked_state(path)
    weights = _read_weights(path, model)
    try:
        states = torch.load(path / _STATES, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors of many kinds
        raise CheckpointError(f"{_STATES} cannot be read: {short(error)}", path=path) from error
    check_optimizer(path, states["optimizer"], model, optimizer)
    return Checkpoint(
        state, states["extra"], read_replay(path), weights, states["optimizer"], states["random"]
    )


def _checked_state(path: Path) -> TrainerState:
    if not (path / MANIFEST).exists():
        read_state(path)  # says so if this is no checkpoint, or one of another format
    check_files(path)
    return read_state(path)


def _read_weights(path: Path, model: Model) -> dict[str, Tensor]:
    holds_adapter = (path / ADAPTER_CONFIG).exists()
    if is_adapter_model(model):
        if not holds_adapter:
            raise CheckpointError(
                "it holds a whole model, and the model to be trained is an adapter on a base model. To go on "
                "with it, train the whole model; to start an adapter on it, load it as the base model",
                path=path,
            )
        return read_adapter(path, model)
    if holds_adapter:
        raise CheckpointError(
            "it holds an adapter, and the model to be trained has none. Make the same adapter on the same "
            "base model (peft.get_peft_model), or start anew from the merged weights (merge_and_unload)",
            path=path,
        )
    return read_full_model(path, cast(PreTrainedModel, model))


def _require_loadable(value: Any, where: str) -> None:
    """Check that `torch.load(weights_only=True)` will read a value."""
    if type(value) in (dict, OrderedDict):
        for name, entry in value.items():
            _require_loadable(name, f"a name in {where}")
            _require_loadable(entry, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _require_loadable(entry, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _SCALARS:
        raise ConfigurationError(
            f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: use tensors, numbers, "
            "text and None in dicts, lists and tuples"
        )
