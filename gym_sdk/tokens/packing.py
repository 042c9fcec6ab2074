"""Rows into micro-batches by token budget."""

from __future__ import annotations

from collections.abc import Sequence

from gym_sdk.errors import ConfigurationError

__all__ = ["pack_by_budget"]


def pack_by_budget(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of like length so that each padded micro-batch stays within a token budget.

    A micro-batch of n rows costs n times its longest row, because rows are padded to it. Rows are taken
    longest first, so padding is small and the first micro-batch shows the peak memory.

    Args:
        lengths: the rows' lengths, in tokens.
        max_tokens: budget of one padded micro-batch. A single row longer than that gets its own.

    Returns:
        Indices into `lengths`, each exactly once, a list for each micro-batch.

    Raises:
        ConfigurationError: `max_tokens` is not positive.
    """
    if max_tokens <= 0:
        raise ConfigurationError(f"max_tokens must be positive, not {max_tokens}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
