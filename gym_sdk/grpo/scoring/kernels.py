"""Fused kernels for the layers of a model."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from gym_sdk.errors import ConfigurationError

__all__ = ["apply_fused_kernels"]


def apply_fused_kernels(model: nn.Module) -> None:
    """Replace a model's norms, rotary embedding and gated MLP by Liger's Triton kernels, in place.

    Liger's losses are left out: log-probs come from `linear_log_probs`. Not yet run with the real package.

    Args:
        model: a causal LM of transformers, or a peft model of one, on a CUDA device.

    Raises:
        ConfigurationError: Liger is not installed, the model is not on a CUDA device, or Liger has no kernels
            for its architecture.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigurationError("fused kernels need liger-kernel; install it, or turn them off")
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ConfigurationError(
            f"fused kernels need a CUDA device, and the model is on {device}; move it first, or turn them off"
        )
    base: Any = getattr(model, "get_base_model", lambda: model)()
    patches = import_module("liger_kernel.transformers.monkey_patch")
    # Liger only logs that it does nothing for a model that it does not know.
    if base.config.model_type not in patches.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigurationError(
            f"liger-kernel has no fused kernels for {base.config.model_type!r} models; turn them off"
        )
    patches._apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
