"""How large the blocks of logits are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gym_sdk.errors import ConfigurationError

__all__ = ["MAX_LOGITS", "ChunkSizes", "choose_chunks"]

MAX_LOGITS = 2**25
"""Default bound on the logits that are alive at any time: 128 MiB in float32."""

_CACHE_LOGITS = 2**20
"""On CPUs, the logits of one block: 4 MiB in float32, so that it is still in the cache when it is reduced.
Blocks from 2**20 to 2**22 logits were equally fast on two cores with 32 MiB of shared cache; 2**23 lost."""

_CPU_TOKENS = 1024
_GPU_TOKENS = 4096
"""Tokens of a block. Each block of tokens reads the whole weight once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSizes:
    """The block of logits that is computed at a time.

    Raises:
        ConfigurationError: a value is out of range; the message names the field.
    """

    tokens: int
    """Tokens of a block."""
    vocab: int
    """Vocabulary entries of a block."""

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"ChunkSizes.{name} must be at least 1, not {getattr(self, name)!r}")


def choose_chunks(tokens: int, vocab: int, device: torch.device, max_logits: int = MAX_LOGITS) -> ChunkSizes:
    """Choose blocks that are fast on a device, within a bound on memory.

    A block takes a quarter of the bound at most: its logits, exponentials and gradients live side by side. If
    all logits fit, they are one block. Otherwise a block stays in the cache on CPUs; on other devices it is
    as large as the bound allows, which keeps the number of kernels small.

    Args:
        tokens: how many tokens are scored.
        vocab: the size of the vocabulary.
        device: where they are scored.
        max_logits: the most logits (tokens times vocabulary) that may be alive at any time, copies included.

    Raises:
        ConfigurationError: `max_logits` is less than 1.
    """
    if max_logits < 1:
        raise ConfigurationError(f"max_logits must be at least 1, not {max_logits}")
    limit = max(1, max_logits // 4)
    if tokens * vocab <= limit:
        return ChunkSizes(tokens=max(1, tokens), vocab=vocab)
    on_cpu = device.type == "cpu"
    limit = min(limit, _CACHE_LOGITS) if on_cpu else limit
    rows = min(tokens, _CPU_TOKENS if on_cpu else _GPU_TOKENS, limit)
    return ChunkSizes(tokens=rows, vocab=min(vocab, limit // rows))
