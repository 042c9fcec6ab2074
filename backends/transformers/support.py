"""What the engine can serve: refused at construction rather than wrong at generation."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from backends.transformers.attention import Segment, StepBatch, slot_module
from backends.transformers.cache import SlotCache
from backends.transformers.config import EngineConfig
from gym_sdk.errors import ConfigurationError

__all__ = ["check_context_length", "supported_module", "vocabulary"]

# Rotary embeddings that depend on the longest position in the batch: exact only up to the original length.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE_TOLERANCE = 5e-2


def check_context_length(model: PreTrainedModel, config: EngineConfig) -> int:
    """Decide how long a row may be.

    Raises:
        ConfigurationError: more is asked for than the model can do, or than the cache may hold.
    """
    text = _text_config(model)
    made_for = getattr(text, "max_position_embeddings", None)
    length = config.context_length or made_for
    if not isinstance(length, int):
        raise ConfigurationError(f"{_name(model)} does not say its context length; set context_length")
    if length < 2:
        raise ConfigurationError(
            f"context_length must be at least 2, a prompt token and a new one, not {length}"
        )
    if isinstance(made_for, int) and length > made_for:
        raise ConfigurationError(f"context_length is {length}; the model is made for {made_for}")
    for limit, reason in _exact_up_to(text):
        if length > limit:
            raise ConfigurationError(
                f"{_name(model)} has {reason}, which this engine computes exactly only up to {limit} tokens; "
                f"context_length is {length}: set it to {limit} or less"
            )
    if config.max_cache_tokens is not None and config.max_cache_tokens < length:
        raise ConfigurationError(
            f"max_cache_tokens is {config.max_cache_tokens}, less than one row of context_length {length}"
        )
    return length


def supported_module(model: PreTrainedModel) -> PreTrainedModel:
    """Make the module that attends over slots, and prove on a few tokens that it computes the same.

    Raises:
        ConfigurationError: the architecture cannot be served.
    """
    name = _name(model)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ConfigurationError(f"{name} is not a causal language model")
    text = _text_config(model)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(model, "_is_stateful", False):
        what = ", ".join(sorted(kinds)) or "a recurrent state"
        raise ConfigurationError(f"{name} has {what}; this engine serves standard attention only")
    if not model._can_set_attn_implementation():
        raise ConfigurationError(f"{name} does not use transformers' attention interface")
    module = slot_module(model)
    try:
        expected, actual = _probe(model, module)
    except Exception as error:
        raise ConfigurationError(f"{name} cannot be run over slots: {error}") from error
    scale = 1.0 + float(expected.abs().max())
    worst = float((expected - actual).abs().max()) / scale
    # written so that NaN, of weights that are still to come, is no objection
    if worst > _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE):
        raise ConfigurationError(
            f"{name} computes other logits over slots than by itself (relative difference {worst:.1e}): "
            "its attention is not the standard one"
        )
    return module


def _probe(model: PreTrainedModel, module: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of two short rows, by the plain model and through prefill, continued prefill and decode."""
    rows = np.random.default_rng(0).integers(0, vocabulary(model), (2, 9))
    lengths = np.array([9, 6])
    cache = SlotCache(model.device)
    cache.reserve(2, 16)
    plain = slot_module(model)
    plain.set_attn_implementation(model.config._attn_implementation)
    with torch.inference_mode():
        expected = [
            plain(input_ids=torch.from_numpy(row[None, :length]).to(model.device), use_cache=False).logits[
                0, -1
            ]
            for row, length in zip(rows, lengths, strict=True)
        ]
        _run(module, cache, rows, np.zeros(0, np.int64), [Segment(0, 0, 5), Segment(1, 0, 5)])
        _run(module, cache, rows, np.zeros(0, np.int64), [Segment(0, 5, 8)])
        actual = _run(module, cache, rows, lengths - 1, [])
    return torch.stack(expected).float(), actual.float()


def _run(
    module: PreTrainedModel,
    cache: SlotCache,
    rows: np.ndarray,
    positions: np.ndarray,
    segments: list[Segment],
) -> Tensor:
    batch = StepBatch(cache, positions, segments)
    logits: Tensor = module(
        input_ids=torch.from_numpy(rows[batch.rows, batch.places])[None].to(cache.device),
        position_ids=batch.position_ids[None],
        use_cache=False,
        logits_to_keep=torch.arange(batch.decoding, device=cache.device),
        slot_batch=batch,
    ).logits[0]
    return logits


def _exact_up_to(text: Any) -> list[tuple[int, str]]:
    limits = []
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    if isinstance(window, int) and slides:
        limits.append((window, "sliding-window attention"))
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    original = isinstance(rope, dict) and rope.get("original_max_position_embeddings")
    if kind in _BATCH_DEPENDENT_ROPE and isinstance(original, int):
        limits.append((original, f"{kind} rotary embeddings"))
    return limits


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model embeds."""
    return int(cast(Tensor, model.get_input_embeddings().weight).shape[0])


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
