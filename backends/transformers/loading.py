"""Models and tensors from folders in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk.errors import CheckpointError

__all__ = ["load_model", "read_tensors"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_model(
    path: Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        path: the folder, with `config.json` and safetensors.
        device: None: CUDA if there is one, else the CPU.
        dtype: None: float32 on the CPU, bfloat16 on CUDA.

    Raises:
        CheckpointError: there is no usable model in the folder.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError("there is no config.json; a model folder is needed", path=path)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot load the model: {error}", path=path) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        # transformers would fill them with random numbers, and the policy would talk nonsense
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}", path=path)
    nn.Module.to(model, place)  # transformers' own `to` is a decorator without types
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors, on the CPU.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """
    if (path / _SINGLE).is_file():
        files = [_SINGLE]
    elif (path / _INDEX).is_file():
        try:
            index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{_INDEX} cannot be read: {error}", path=path) from error
    else:
        raise CheckpointError(f"there is neither {_SINGLE} nor {_INDEX}", path=path)
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(path / name, framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    tensors[key] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", path=path / name) from error
    return tensors


def _some(names: list[str], most: int = 3) -> str:
    """Name a few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
