"""Hidden states of a batch from a transformers decoder, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.packing.cpu import cpu_attention
from gym_sdk.grpo.packing.flex import flex_forest_attention
from gym_sdk.grpo.packing.layout import ForestLayout
from gym_sdk.grpo.packing.packed import PackedBatch
from gym_sdk.grpo.packing.padded import TokenBatch

__all__ = ["hidden_before"]

FOREST = "gym_sdk_forest"
"""The name of our attention in transformers' registry. No mask is registered under it, so none is built."""


def hidden_before(backbone: nn.Module, batch: TokenBatch | PackedBatch) -> Float[Tensor, "pairs size"]:
    """Compute the backbone's last hidden state at the position before each target.

    A padded batch runs as it is, with the model's own attention. A packed batch runs as one row whose
    attention knows the forest; everything else in a decoder acts on each token alone. The model must take
    `position_ids` and look its attention up in transformers' `AttentionInterface`; `check_packing` tells
    whether it does. Gradient checkpointing and adapters (peft) work as ever.

    Args:
        backbone: the decoder of a causal LM (`model.get_decoder()`). Nobody else may run it meanwhile.
        batch: rows on the backbone's device.

    Returns:
        Hidden states, with gradient, aligned with `batch.targets`.

    Raises:
        ConfigurationError: the model's attention has a feature that packed rows do not support, or the device
            has no attention for them.
    """
    if isinstance(batch, TokenBatch):
        # Under causal attention no token sees the padding to its right. Without a mask, attention takes its
        # fast causal path.
        output = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    else:
        with _forest_attention(backbone):
            output = backbone(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                forest=batch.layout,
            )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.predecessors)


@contextmanager
def _forest_attention(backbone: nn.Module) -> Iterator[None]:
    configs = _configs(backbone)
    checkpointing: dict[Any, Callable[..., Any]] = {
        module: module._gradient_checkpointing_func  # type: ignore[misc]
        for module in backbone.modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    for module, run in checkpointing.items():
        module._gradient_checkpointing_func = partial(_checkpoint, run, configs)
    try:
        with _switched(configs):
            yield
    finally:
        for module, run in checkpointing.items():
            module._gradient_checkpointing_func = run


def _checkpoint(
    run: Callable[..., Any], configs: Sequence[PretrainedConfig], function: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoint a function that runs with our attention whenever it runs.

    It runs again in the backward pass, when the configs have long been switched back. The layout reaches it
    there among the arguments that transformers binds to it.
    """

    def switched(*inputs: Any) -> Any:
        with _switched(configs):
            return function(*inputs)

    return run(switched, *args)


@contextmanager
def _switched(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = FOREST
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _configs(backbone: nn.Module) -> list[PretrainedConfig]:
    found = (getattr(module, "config", None) for module in backbone.modules())
    return list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())


def _attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens size"],
    key: Float[Tensor, "1 kv_heads tokens size"],
    value: Float[Tensor, "1 kv_heads tokens size"],
    _attention_mask: None,
    *,
    forest: ForestLayout | None = None,
    scaling: float | None = None,
    **features: Any,
) -> tuple[Float[Tensor, "1 tokens heads size"], None]:
    """Attend as transformers asks every attention function to."""
    if forest is None:
        raise ConfigurationError(
            f"{type(module).__name__} is not handed its model's keyword arguments, which packed rows need; "
            "use pack=False"
        )
    _check_features(module, query, value, forest, features)
    # Under autocast, rotary embedding leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = {"cpu": cpu_attention, "cuda": flex_forest_attention}.get(query.device.type)
    if attend is None:
        raise ConfigurationError(
            f"packed rows need a CPU or a CUDA device, not {query.device.type!r}; use pack=False"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query[0], key[0], value[0], forest, scale)[None], None


def _check_features(
    module: nn.Module, query: Tensor, value: Tensor, forest: ForestLayout, features: dict[str, Any]
) -> None:
    window = features.get("sliding_window")
    problems = {
        "attention dropout": features.get("dropout", 0.0) > 0.0,
        f"a sliding window of {window} tokens, and rows are longer": window and forest.longest > window,
        "soft-capped scores": features.get("softcap") is not None,
        "attention sinks": features.get("s_aux") is not None,
        "a position bias": features.get("position_bias") is not None,
        "attention in both directions": not getattr(module, "is_causal", True),
        "values of another size than keys": query.shape[-1] != value.shape[-1],
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ConfigurationError(
                f"{type(module).__name__} has {problem}, which packed rows do not support; use pack=False"
            )


AttentionInterface.register(FOREST, _attend)
