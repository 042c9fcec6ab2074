"""Sampling from logits: temperature, top-k, top-p, repeatable per request, with log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Mask", "likeliest", "mix_seed", "sample", "uniforms"]

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


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens some of the rows may sample.

    Attributes:
        rows: int64 `[M]`, which rows.
        allowed: bool `[M, vocab]`.
    """

    rows: np.ndarray
    allowed: Tensor


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token for each row by inverting its cumulative distribution.

    `multinomial` costs ten times as much on CPU, and its draws depend on the batch.

    Args:
        logits: `[rows, vocab]`, any float type.
        uniform: `[rows]`, float64 in [0, 1).
        temperature: `[rows]`; 0 is greedy.
        top_k: `[rows]`; 0 is off.
        top_p: `[rows]`, in (0, 1]. The nucleus is taken of what top-k leaves, renormalised.
        mask: takes tokens away before top-k and top-p do.

    Returns:
        Token ids and their natural-log probabilities at the row's temperature (1 if greedy) before the mask,
        top-k and top-p, both `[rows]`. Where the mask leaves nothing that could be sampled, the token means
        nothing and its log-prob is -inf.
    """
    greedy = temperature == 0.0
    log_probs = choices = _log_probs(logits, temperature)
    if mask is not None:
        rows = torch.from_numpy(mask.rows).to(logits.device)
        left = logits[rows].masked_fill(~mask.allowed, -torch.inf)
        # scored anew, since probabilities outside the mask may be all that float32 can tell from 0
        choices = log_probs.index_copy(0, rows, _log_probs(left, temperature[mask.rows]))
    if greedy.all():
        tokens = choices.argmax(-1)
    else:
        tokens = _invert(choices, uniform, top_k, top_p)
        if greedy.any():
            chosen = torch.from_numpy(greedy).to(logits.device)
            tokens = torch.where(chosen, choices.argmax(-1), tokens)
    scores = _of(log_probs, tokens)
    if mask is not None:
        nothing = ~_of(choices, tokens).isfinite() & ~scores.isnan()
        scores = scores.masked_fill(nothing, -torch.inf)
    return tokens, scores


def likeliest(logits: Tensor, temperature: np.ndarray, most: int) -> tuple[Tensor, Tensor]:
    """Find the likeliest tokens of each row, likeliest first.

    Args:
        logits: `[rows, vocab]`, any float type.
        temperature: `[rows]`; 0 is greedy.
        most: how many; fewer if the vocabulary has fewer.

    Returns:
        Their ids and their natural-log probabilities as `sample` reports them, both `[rows, most]`.
    """
    values, tokens = _log_probs(logits, temperature).topk(min(most, logits.shape[-1]), dim=-1)
    return tokens, values


def _of(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]


def _log_probs(logits: Tensor, temperature: np.ndarray) -> Tensor:
    """Score all tokens at each row's temperature, 1 if that is 0."""
    logits = logits.float()
    greedy = temperature == 0.0
    scaled = (temperature != 1.0) & ~greedy
    if scaled.any():
        divisor = torch.from_numpy(np.where(greedy, 1.0, temperature)).to(logits.device)
        # the largest becomes 0 first: a tiny temperature then gives -inf for the others, never NaN
        shifted = logits - logits.amax(-1, keepdim=True)
        logits = (shifted.double() / divisor[:, None]).float()
    return logits.log_softmax(-1)


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
