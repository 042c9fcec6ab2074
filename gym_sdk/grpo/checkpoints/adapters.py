"""The weights of a peft adapter alone, and what they belong to: its base model, which is not copied."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gym_sdk.errors import CheckpointError, ConfigurationError
from gym_sdk.grpo.checkpoints.comparing import as_json, check_config, check_same, check_shapes, short
from gym_sdk.grpo.models import require_unmerged

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["ADAPTER_CONFIG", "adapter_tensors", "read_adapter", "save_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_BASE = "trainer/base.json"
_SAMPLES = 64
# Settings of an adapter that matter only when it is made, or where its base lies.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    }
)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the active adapter's own tensors, under the names that they have in its file.

    Raises:
        ConfigurationError: several adapters are active or they are merged, or something is trained that is
            not in the adapter.
    """
    require_unmerged(model)
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub about the base model, and copy embeddings that nobody trained
    found = get_peft_model_state_dict(model, adapter_name=_active(model), save_embedding_layers=False)
    tensors: dict[str, Tensor] = found
    memory = {tensor.data_ptr() for tensor in tensors.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in memory:
            raise ConfigurationError(
                f"{name} is trained and not part of the adapter, so its file would not hold it. Freeze it, "
                "or name its module in the adapter's modules_to_save"
            )
    return tensors


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the active adapter in peft's layout, and which base model it belongs to.

    Raises:
        ConfigurationError: as for `adapter_tensors`.
    """
    tensors = adapter_tensors(model)
    config = copy.copy(model.peft_config[_active(model)])
    config.inference_mode = True
    # not peft's own save: it writes a model card
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    base = {
        "name": config.base_model_name_or_path,
        "config": as_json(model.config.to_dict()),
        "parameters": _fingerprints(model),
    }
    (folder / _BASE).write_text(json.dumps(base, indent=1), encoding="utf-8")


def read_adapter(path: Path, model: PeftModel) -> dict[str, Tensor]:
    """Read the tensors that the active adapter would have, by their names in its file; on the CPU.

    Raises:
        CheckpointError: they belong to another base model or to an adapter of another kind, or cannot be
            read.
    """
    config = model.peft_config[_active(model)]
    try:
        saved = type(config).from_pretrained(str(path)).to_dict()
        base = json.loads((path / _BASE).read_text(encoding="utf-8"))
        weights = load_file(path / _WEIGHTS)
    except Exception as error:  # safetensors has errors of its own
        raise CheckpointError(f"the adapter cannot be read: {short(error)}", path=path) from error
    check_config(path, base["config"], model.config)
    check_same(path, "adapter", saved, config.to_dict(), ignored=_HARMLESS, first="peft_type")
    _check_base(path, base, model)
    check_shapes(path, weights, adapter_tensors(model))
    return weights


def _active(model: PeftModel) -> str:
    active: list[str] = model.active_adapters
    if len(active) != 1:
        raise ConfigurationError(
            f"a checkpoint holds one adapter, and {len(active)} are active; choose one with model.set_adapter"
        )
    return active[0]


def _fingerprints(model: PeftModel) -> dict[str, str]:
    """Return a hash of each parameter of the base: of its shape and of evenly spaced samples of its values.

    They are compared as float32, so that the same weights have the same ones in a wider type.
    """
    adapter = _active(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or adapter in name.split("."):
            continue
        flat = parameter.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        digest = hashlib.sha256(str(list(parameter.shape)).encode())
        digest.update(flat[places].float().cpu().numpy().tobytes())
        found[name] = digest.hexdigest()[:16]
    return found


def _check_base(path: Path, base: dict[str, Any], model: PeftModel) -> None:
    saved, current = base["parameters"], _fingerprints(model)
    for name in sorted({*saved, *current}):
        if saved.get(name) != current.get(name):
            raise CheckpointError(
                f"its adapter belongs to another base model: {name} differs. Load the one that it was "
                f"trained on ({base['name'] or 'which had no name'}), unchanged",
                path=path,
            )
