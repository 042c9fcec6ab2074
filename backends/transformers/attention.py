"""Attention over slots, plugged into a transformers model by its own attention interface.

One forward pass takes a single flat row of tokens: first one token of each decoding slot, then stretches of
prompts. Everything but attention is the same for every token, so the model's own code serves unchanged and
nothing is padded; attention looks up which slot each token belongs to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from backends.transformers.cache import SlotCache
from gym_sdk.errors import ConfigurationError

__all__ = ["Segment", "StepBatch", "slot_module"]

_IMPLEMENTATION = "gym_sdk_slots"

# Arguments that change what attention computes, and that this implementation does not know.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions `start <= i < end` of one slot, to be computed in this step."""

    row: int
    start: int
    end: int


class StepBatch:
    """What one forward pass computes: which slot and position each of its T tokens has.

    Rows `0 .. decoding - 1` get one token each, at `positions[row]`; then follow the segments. The cache
    must already hold room for all of them.
    """

    def __init__(self, cache: SlotCache, positions: np.ndarray, segments: Sequence[Segment]) -> None:
        self.cache = cache
        self.decoding = len(positions)
        self.segments = segments
        rows = [np.arange(self.decoding), *(np.full(s.end - s.start, s.row) for s in segments)]
        places = [positions, *(np.arange(s.start, s.end) for s in segments)]
        self.rows = np.concatenate(rows)
        self.places = np.concatenate(places)
        self.width = int(positions.max()) + 1 if self.decoding else 0
        self._rows = torch.from_numpy(self.rows).to(cache.device)
        self.position_ids = torch.from_numpy(self.places).to(cache.device)
        self._index: dict[int, Tensor] = {}
        self._decode_mask: dict[int, Tensor] = {}
        self._segment_masks: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the new keys and values, then attend: the result is `[1, T, heads, value_head_dim]`.

        Args:
            layer: the layer's number.
            query: `[1, heads, T, head_dim]`.
            key: `[1, kv_heads, T, head_dim]`.
            value: `[1, kv_heads, T, value_head_dim]`.
            scaling: factor on the scores.
        """
        kv_heads = key.shape[1]
        if kv_heads not in self._index:
            self._index[kv_heads] = self.cache.flat_index(self._rows, self.position_ids, kv_heads)
        self.cache.write(layer, self._index[kv_heads], key[0].transpose(0, 1), value[0].transpose(0, 1))
        parts = []
        if self.decoding:
            parts.append(self._decode(layer, query[0, :, : self.decoding], kv_heads, scaling))
        offset = self.decoding
        for number, segment in enumerate(self.segments):
            span = slice(offset, offset + segment.end - segment.start)
            offset = span.stop
            if segment.start == 0:
                out = _causal(query[:, :, span], key[:, :, span], value[:, :, span], scaling)
            else:
                out = self._continue(layer, number, query[:, :, span], scaling)
            parts.append(out[0].transpose(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _decode(self, layer: int, query: Tensor, kv_heads: int, scaling: float) -> Tensor:
        """One token of each decoding slot against its slot: `[decoding, heads, value_head_dim]`.

        The query heads that share a kv head become its query length, so keys are never repeated. Plain
        batched products beat `scaled_dot_product_attention` with a mask more than twofold on CPU.
        """
        heads, count = query.shape[0], self.decoding
        key = self.cache.keys[layer][:count, :, : self.width].flatten(0, 1)
        value = self.cache.values[layer][:count, :, : self.width].flatten(0, 1)
        packed = query.transpose(0, 1).reshape(count * kv_heads, heads // kv_heads, -1)
        scores = torch.baddbmm(self._mask(kv_heads, packed.dtype), packed, key.transpose(1, 2), alpha=scaling)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        return torch.bmm(weights, value).view(count, heads, -1)

    def _mask(self, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """Additive mask `[decoding * kv_heads, 1, width]`: 0 up to each slot's position, -inf beyond."""
        if kv_heads not in self._decode_mask:
            places = self.position_ids[: self.decoding, None]
            hidden = torch.arange(self.width, device=places.device) > places
            mask = torch.zeros(hidden.shape, dtype=dtype, device=places.device)
            mask.masked_fill_(hidden, float("-inf"))
            self._decode_mask[kv_heads] = mask[:, None].expand(-1, kv_heads, -1).reshape(-1, 1, self.width)
        return self._decode_mask[kv_heads]

    def _continue(self, layer: int, number: int, query: Tensor, scaling: float) -> Tensor:
        """A segment that follows cached positions: `[1, heads, tokens, value_head_dim]`."""
        segment = self.segments[number]
        key = self.cache.keys[layer][segment.row : segment.row + 1, :, : segment.end]
        value = self.cache.values[layer][segment.row : segment.row + 1, :, : segment.end]
        if number not in self._segment_masks:
            shape = (segment.end - segment.start, segment.end)
            ones = torch.ones(shape, dtype=torch.bool, device=key.device)
            self._segment_masks[number] = ones.tril(diagonal=segment.start)
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:  # `enable_gqa` with a mask falls back to the kernel that holds all scores in memory
            key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        mask = self._segment_masks[number]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def _slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_batch: StepBatch,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend in the signature that transformers' attention interface calls."""
    changed = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if attention_mask is not None:
        changed.append("attention_mask")
    if changed:
        raise ConfigurationError(f"attention with {', '.join(changed)} cannot be computed over slots")
    if scaling is None:
        scaling = float(query.shape[-1]) ** -0.5
    return slot_batch.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


def slot_module(model: PreTrainedModel) -> PreTrainedModel:
    """Make a second module over the same parameters that attends over slots, in evaluation mode.

    Parameters and buffers are shared, not copied; configuration, mode and hooks are the new module's own, so
    a trainer may keep the first one in training mode.
    """
    AttentionInterface.register(_IMPLEMENTATION, _slot_attention)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    module: PreTrainedModel = copy.deepcopy(model, shared)
    module.eval()
    module.set_attn_implementation(_IMPLEMENTATION)
    return module
