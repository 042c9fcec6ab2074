"""The weights of a whole model: config.json and safetensors."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import CheckpointError
from gym_sdk.grpo.checkpoints.comparing import check_config, check_shapes, short
from gym_sdk.grpo.checkpoints.folders import quiet

__all__ = ["read_full_model"]


def read_full_model(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the weights that a model would have, by their names in its `state_dict()`; on the CPU.

    Raises:
        CheckpointError: they are of another model, or cannot be read.
    """
    check_config(path, _config(path), model.config)
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    try:
        # What a model's initialisation draws must not be missing from the run that resumes.
        with quiet(), torch.random.fork_rng(devices=[]):
            model_class: Any = type(model)
            loaded, report = model_class.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # transformers and safetensors raise many kinds; each means unusable weights
        raise CheckpointError(f"the weights cannot be read: {short(error)}", path=path) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[problem]):
            raise CheckpointError(
                f"the weights are incomplete or of another model: {problem} {', '.join(names[:3])}", path=path
            )
    weights: dict[str, Tensor] = loaded.state_dict()
    check_shapes(path, weights, model.state_dict())
    return weights


def _config(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"config.json cannot be read: {error}", path=path) from error
    return saved
