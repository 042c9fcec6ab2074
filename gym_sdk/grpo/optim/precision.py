"""What a model computes in, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Precision", "autocast", "enable_gradient_checkpointing"]

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Return a context for forward passes at a precision.

    - `float32`: everything is computed in the precision of the weights, an outer autocast notwithstanding.
    - `bfloat16`: matrix products of float32 weights are computed in bfloat16; weights, gradients, norms and
      softmax stay in float32. It needs no loss scaling, since bfloat16 has the range of float32.

    Backward passes belong outside of it.

    Raises:
        ConfigurationError: the precision is neither, or the GPU has no bfloat16.
    """
    if precision not in get_args(Precision):
        raise ConfigurationError(f"precision must be 'float32' or 'bfloat16', not {precision!r}")
    kind = torch.device(device).type
    if (
        precision == "bfloat16"
        and kind == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigurationError("precision 'bfloat16' needs a GPU that has it; choose 'float32'")
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def enable_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Have each layer keep its input alone, and compute the rest again in the backward pass.

    Memory for activations falls from all that the layers compute to one vector for each layer and token, plus
    one layer at work; the price is about a third more time. Results do not change. It cannot be taken back,
    and a second call changes nothing.

    Not transformers' own switch: that one works in training mode alone, and this trainer computes log-probs
    in evaluation mode (no dropout), as the engine does. Passes without gradient, or with a cache of keys and
    values, are as before.

    Raises:
        ConfigurationError: the model is not made of layers that transformers can checkpoint.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} does not support gradient checkpointing; leave it off"
        )
    for layer in layers:
        # a bound method, so that a deep copy of the model calls its own layer
        layer.forward = MethodType(_forward, layer)


def _forward(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    forward = type(self).forward
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(self, *args, **kwargs)
    attention = _attention_of(self)

    def run(*inputs: Any, **options: Any) -> Any:
        with _attention_set(attention):
            return forward(self, *inputs, **options)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


_Attention = list[tuple[PretrainedConfig, "str | None"]]


def _attention_of(layer: GradientCheckpointingLayer) -> _Attention:
    """Return which attention a layer's configs say now: a packed batch sets its own for the forward pass."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return [
        (config, config._attn_implementation) for config in configs if isinstance(config, PretrainedConfig)
    ]


@contextmanager
def _attention_set(attention: _Attention) -> Iterator[None]:
    """Have the layer computed again with the attention that it was computed with the first time."""
    before = [(config, config._attn_implementation) for config, _ in attention]
    for config, name in attention:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
