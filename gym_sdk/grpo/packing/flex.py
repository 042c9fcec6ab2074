"""Attention over a forest of segments with PyTorch's FlexAttention, which CUDA devices compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gym_sdk.grpo.packing.layout import ForestLayout

__all__ = ["flex_forest_attention", "make_block_mask"]

BLOCK = 128
"""Tokens of a block, FlexAttention's default."""


def flex_forest_attention(
    query: Float[Tensor, "heads tokens size"],
    key: Float[Tensor, "kv_heads tokens size"],
    value: Float[Tensor, "kv_heads tokens size"],
    layout: ForestLayout,
    scale: float,
) -> Float[Tensor, "tokens heads size"]:
    """Compute what `cpu_attention` does, in one kernel that skips blocks of keys that nobody sees.

    Compiled on CUDA, eager elsewhere. What has been run is the eager form against `cpu_attention` (values;
    PyTorch has no backward pass of it on CPUs), and the block structure against the dense mask.

    Args:
        query: rotated queries; the heads may be a multiple of the key heads.
        key: rotated keys.
        value: values, of the same size as the keys.
        layout: which tokens see which.
        scale: what scores are multiplied by.
    """
    attend: Any = _compiled() if query.is_cuda else flex_attention
    out: Tensor = attend(
        query[None],
        key[None],
        value[None],
        block_mask=make_block_mask(layout),
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=2)  # every layer asks for the same one
def make_block_mask(layout: ForestLayout) -> BlockMask:
    """Find the pairs of blocks to compute from the layout, without the mask of all pairs of tokens.

    A block of keys is partly seen by a block of queries if its first key is not after the last query and some
    key has a reader after the first query; it is wholly seen if that holds for every key and query.
    """
    last_reader = layout.last_reader
    tokens = len(last_reader)
    blocks = -(-tokens // BLOCK)
    # Beyond the end, keys have no reader, so a last block that is not full is never seen as a whole.
    readers = torch.nn.functional.pad(last_reader, (0, blocks * BLOCK - tokens)).view(blocks, BLOCK)
    first = torch.arange(blocks, device=last_reader.device) * BLOCK
    query_first, query_last = first[:, None], first[:, None] + BLOCK - 1
    some = (first <= query_last) & (readers.amax(1) > query_first)
    whole = (first + BLOCK - 1 <= query_first) & (readers.amin(1) > query_last)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < last_reader[key])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def _listed(chosen: Bool[Tensor, "queries keys"]) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, and their numbers, chosen ones first."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return chosen.sum(1).int()[None, None], order[None, None]


@cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled
