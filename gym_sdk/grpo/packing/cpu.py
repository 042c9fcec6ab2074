"""Attention over a forest of segments on a CPU: no mask, no padding, and no copy of a shared key."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from gym_sdk.grpo.packing.layout import ForestLayout

__all__ = ["cpu_attention"]

# The kernel behind scaled_dot_product_attention on CPUs. The public function does not return the logsumexp of
# the scores, without which parts of a row's keys cannot be merged exactly.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_attention(
    query: Float[Tensor, "heads tokens size"],
    key: Float[Tensor, "kv_heads tokens size"],
    value: Float[Tensor, "kv_heads tokens size"],
    layout: ForestLayout,
    scale: float,
) -> Float[Tensor, "tokens heads size"]:
    """Compute `softmax(scale * q k) v` over the keys that each token of a packed stream sees.

    Each segment attends to itself causally, and all its descendants together attend to it; both are one call
    on slices of the stream. A token's parts are merged by their logsumexp: with l = log sum_i exp(l_i), the
    output is sum_i exp(l_i - l) out_i. In the backward pass the kernel gets the merged output and logsumexp
    for each part, from which it computes exactly that part's share of the gradients (as ring attention does:
    arXiv 2310.01889, on arXiv 2205.14135, algorithm 4). What is kept for it is query, key, value, output and
    logsumexp of the stream, once.

    Args:
        query: rotated queries; the heads may be a multiple of the key heads.
        key: rotated keys.
        value: values, of the same size as the keys.
        layout: which tokens see which.
        scale: what scores are multiplied by.
    """
    out: Tensor = _ForestAttention.apply(query, key, value, layout, scale)
    return out


class _ForestAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, scale: float
    ) -> Tensor:
        accumulated = torch.promote_types(query.dtype, torch.float32)
        heads, tokens, size = query.shape
        out = query.new_empty((tokens, heads, size), dtype=accumulated)
        merged = _by_key_head(out.transpose(0, 1), key)
        logsumexp = query.new_empty(merged.shape[:-1], dtype=accumulated)
        inputs = _aligned(query, key, value)
        for queries, keys, is_own in layout.reads():
            part, part_logsumexp = _forward(*_cut(inputs, queries, keys), 0.0, is_own, scale=scale)
            here, here_logsumexp = merged[:, :, queries], logsumexp[:, :, queries]
            if is_own:
                here.copy_(part)
                here_logsumexp.copy_(part_logsumexp)
            else:
                total = torch.logaddexp(here_logsumexp, part_logsumexp)
                here.mul_((here_logsumexp - total).exp_()[..., None])
                here.add_(part.mul_((part_logsumexp - total).exp_()[..., None]))
                here_logsumexp.copy_(total)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        inputs = _aligned(query, key, value)
        out, grad_out = (_by_key_head(tensor.transpose(0, 1), key) for tensor in (out, grad_out))
        grads = [torch.empty_like(tensor, dtype=logsumexp.dtype) for tensor in (query, key, value)]
        grad_query, grad_key, grad_value = _by_key_head(grads[0], key), grads[1], grads[2]
        for queries, keys, is_own in ctx.layout.reads():
            parts = _backward(
                grad_out[:, :, queries],
                *_cut(inputs, queries, keys),
                out[:, :, queries],
                logsumexp[:, :, queries],
                0.0,
                is_own,
                scale=ctx.scale,
            )
            write = Tensor.copy_ if is_own else Tensor.add_  # own parts come first, and cover every token
            write(grad_query[:, :, queries], parts[0])
            write(grad_key[:, keys], parts[1].sum(1))
            write(grad_value[:, keys], parts[2].sum(1))
        return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype), None, None


def _by_key_head(tensor: Tensor, key: Tensor) -> Tensor:
    """View [heads, ...] as [kv_heads, heads of each, ...]."""
    heads: Tensor = tensor.unflatten(0, (key.shape[0], -1))
    return heads


def _aligned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View all three as [kv_heads, heads of each, tokens, size]; keys and values are not copied for that."""
    query = _by_key_head(query, key)
    shape = (-1, query.shape[1], -1, -1)
    return query, key[:, None].expand(shape), value[:, None].expand(shape)


def _cut(inputs: tuple[Tensor, Tensor, Tensor], queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs
    return query[:, :, queries], key[:, :, keys], value[:, :, keys]
