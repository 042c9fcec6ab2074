"""Sampling from logits: temperature, top-k, top-p, repeatable per request, with log-probs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["mix_seed", "sample", "uniforms"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014, section 5)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def mix_seed(seed: int) -> int:
    """Spread a user's seed over 64 bits, so that neighbouring seeds have unrelated streams."""
    return int(_mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))[0])


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Draw one uniform number in [0, 1) for each request.

    It depends on the request's key and on how many tokens it has sampled, on nothing else: that is what makes
    a seeded request repeatable whatever runs beside it.

    Args:
        keys: uint64, from `mix_seed`.
        counters: tokens sampled so far.
    """
    bits = _mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    # 48 bits, so that a product with a sum of probabilities stays below that sum after rounding
    return (bits >> np.uint64(16)).astype(np.float64) * 2.0**-48


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Sample one token for each row by inverting its cumulative distribution.

    `multinomial` costs ten times as much on CPU, and its draws depend on the batch.

    Args:
        logits: `[rows, vocab]`, any float type.
        uniform: `[rows]`, float64 in [0, 1).
        temperature: `[rows]`; 0 is greedy.
        top_k: `[rows]`; 0 is off.
        top_p: `[rows]`, in (0, 1]. The nucleus is taken of what top-k leaves, renormalised.

    Returns:
        Token ids and their natural-log probabilities at the row's temperature (1 if greedy) before top-k
        and top-p, both `[rows]`.
    """
    logits = logits.float()
    greedy = temperature == 0.0
    scaled = (temperature != 1.0) & ~greedy
    if scaled.any():
        divisor = torch.from_numpy(np.where(greedy, 1.0, temperature)).to(logits.device)
        # the largest becomes 0 first: a tiny temperature then gives -inf for the others, never NaN
        shifted = logits - logits.amax(-1, keepdim=True)
        logits = (shifted.double() / divisor[:, None]).float()
    log_probs = logits.log_softmax(-1)
    if greedy.all():
        tokens = log_probs.argmax(-1)
    else:
        tokens = _invert(log_probs, uniform, top_k, top_p)
        if greedy.any():
            chosen = torch.from_numpy(greedy).to(logits.device)
            tokens = torch.where(chosen, log_probs.argmax(-1), tokens)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _invert(log_probs: Tensor, uniform: Tensor, top_k: np.ndarray, top_p: np.ndarray) -> Tensor:
    probs = log_probs.exp()
    limited = np.flatnonzero((top_p < 1.0) | ((top_k > 0) & (top_k < probs.shape[-1])))
    if len(limited):
        rows = torch.from_numpy(limited).to(probs.device)
        probs[rows] = _truncate(probs[rows], top_k[limited], top_p[limited])
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = (uniform * cumulative[:, -1])[:, None]
    # right=True: a token of probability 0 is never chosen. Only NaN weights get past the end.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _truncate(probs: Tensor, top_k: np.ndarray, top_p: np.ndarray) -> Tensor:
    """Zero what top-k and then top-p exclude; `[rows, vocab]`, not renormalised."""
    vocab = probs.shape[-1]
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    most = torch.from_numpy(np.where(top_k == 0, vocab, top_k)).to(probs.device)
    ordered = ordered.masked_fill(torch.arange(vocab, device=probs.device) >= most[:, None], 0.0)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    limit = torch.from_numpy(top_p).to(probs.device)[:, None] * cumulative[:, -1:]
    before = cumulative - ordered  # the token that crosses the limit belongs to the nucleus
    outside = before >= limit
    outside[:, 0] = False
    # a nucleus of 1 is everything: rounding must not drop the tail
    outside &= torch.from_numpy(top_p < 1.0).to(probs.device)[:, None]
    return torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(outside, 0.0))
