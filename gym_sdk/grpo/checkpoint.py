"""Checkpoints that resume exactly, in a folder that any tool loads as a model.

Layout: the model (config.json, *.safetensors, the tokenizer's files if known) in the Hugging Face layout, and
beside it `trainer/state.json` (step, position, config) and `trainer/state.pt` (optimizer, random states).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gym_sdk.errors import CheckpointError
from gym_sdk.grpo.folders import copy_tokenizer, new_folder, previous_of, quiet, save_model

__all__ = ["Checkpoint", "TrainerState", "read_checkpoint", "write_checkpoint"]

_FORMAT = 1
# Settings that do not change what the model computes.
_HARMLESS = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainerState:
    """Where a training run stands.

    Attributes:
        step: completed steps.
        position: batches of tasks drawn.
        weight_step: the step after which the weights last changed; names their version.
        tasks: fingerprint of the order of tasks (`TaskOrder.fingerprint`).
        config: the trainer's settings, for the record.
    """

    step: int
    position: int
    weight_step: int
    tasks: str
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and found to fit; nothing has been changed yet."""

    state: TrainerState
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: dict[str, Any]

    def apply(self, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Put weights, optimizer and random states back."""
        hyperparameters = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(self.weights[name])
        optimizer.load_state_dict(self.optimizer)
        # the moments are the checkpoint's, the settings this run's
        for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
        _set_random_state(self.random)


def write_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: Optimizer,
    state: TrainerState,
    *,
    tokenizer_dir: Path | None = None,
) -> None:
    """Write a checkpoint; one at the same path is replaced, and stays whole if this fails.

    Args:
        path: the checkpoint's folder.
        model: saved with its config.
        optimizer: its state is saved.
        state: where the run stands.
        tokenizer_dir: a model folder whose tokenizer files are copied into the checkpoint.
    """
    with new_folder(path, durable=True) as folder:
        save_model(model, folder)
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, folder)
        own = folder / "trainer"
        own.mkdir()
        record = {"format": _FORMAT} | dataclasses.asdict(state)
        (own / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        torch.save({"optimizer": optimizer.state_dict(), "random": _random_state()}, own / "state.pt")


def read_checkpoint(path: Path, model: PreTrainedModel, optimizer: Optimizer) -> Checkpoint:
    """Read a checkpoint and check that it fits the model and its optimizer, without changing them.

    If a kill left only the predecessor of the folder (see `new_folder`), that is read.

    Raises:
        CheckpointError: there is none, a file is missing or damaged, or it is of another model; the message
            names the first setting or parameter that differs.
    """
    if not path.exists() and previous_of(path).exists():
        path = previous_of(path)
    state = _read_state(path)
    _check_config(path, model)
    weights = _read_weights(path, model)
    try:
        saved = torch.load(path / "trainer" / "state.pt", map_location="cpu", weights_only=True)
        optimizer_state, random_state = saved["optimizer"], saved["random"]
        _check_optimizer(path, optimizer_state, optimizer)
    except CheckpointError:
        raise
    except Exception as error:  # zip, pickle and lookup errors of many kinds: each means a damaged file
        raise CheckpointError(f"trainer/state.pt cannot be read: {_short(error)}", path=path) from error
    return Checkpoint(state, weights, optimizer_state, random_state)


def _read_state(path: Path) -> TrainerState:
    file = path / "trainer" / "state.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("there is no checkpoint here (no trainer/state.json)", path=path) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"trainer/state.json cannot be read: {error}", path=path) from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(f"format {found!r} is not {_FORMAT}, which this version reads", path=path)
    fields = [field.name for field in dataclasses.fields(TrainerState)]
    missing = [name for name in fields if name not in record]
    if missing:
        raise CheckpointError(f"trainer/state.json lacks {', '.join(missing)}", path=path)
    return TrainerState(**{name: record[name] for name in fields})


def _check_config(path: Path, model: PreTrainedModel) -> None:
    try:
        saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
        saved = type(model.config).from_dict(saved).to_dict() | {"model_type": saved["model_type"]}
    except Exception as error:  # from_dict raises what its validators raise
        raise CheckpointError(f"config.json cannot be read: {_short(error)}", path=path) from error
    current = json.loads(json.dumps(model.config.to_dict(), default=str))
    saved = json.loads(json.dumps(saved, default=str))
    names = sorted((saved.keys() | current.keys()) - _HARMLESS, key=lambda name: (name != "model_type", name))
    for name in names:
        if not name.startswith("_") and saved.get(name) != current.get(name):
            raise CheckpointError(
                f"it is of another model: {name} is {saved.get(name)!r} in the checkpoint and "
                f"{current.get(name)!r} in the model to be trained",
                path=path,
            )


def _read_weights(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    try:
        with quiet():
            model_class: Any = type(model)
            loaded, report = model_class.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers and safetensors raise many kinds; each means unusable weights
        raise CheckpointError(f"the weights cannot be read: {_short(error)}", path=path) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[problem]):
            raise CheckpointError(
                f"the weights are incomplete or of another model: {problem} {', '.join(names[:3])}", path=path
            )
    weights: dict[str, Tensor] = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = list(weights[name].shape) if name in weights else "absent"
            raise CheckpointError(
                f"it is of another model: parameter {name} is {found} in the checkpoint and "
                f"{list(tensor.shape)} in the model to be trained",
                path=path,
            )
    return weights


def _check_optimizer(path: Path, saved: dict[str, Any], optimizer: Optimizer) -> None:
    expected = [list(group["params"]) for group in optimizer.param_groups]
    found = [group["params"] for group in saved["param_groups"]]
    if [len(group) for group in expected] != [len(group) for group in found]:
        raise CheckpointError("its optimizer has other parameters than the model to be trained", path=path)
    for parameters, indices in zip(expected, found, strict=True):
        for parameter, index in zip(parameters, indices, strict=True):
            moments = saved["state"].get(index, {})
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"its optimizer's {name} of parameter {index} is {list(value.shape)}; "
                        f"the model's parameter is {list(parameter.shape)}",
                        path=path,
                    )


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss))
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def _short(error: Exception) -> str:
    """Return an error's class and first line; transformers' messages run to pages."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
