"""Imports that need the extra `store`, with an error that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gym_sdk.errors import ConfigurationError

__all__ = ["needs_store_extra"]


@contextmanager
def needs_store_extra() -> Iterator[None]:
    """Turn a missing package inside the block into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f'zstd, Parquet and datasets need more packages: pip install "gym-sdk[store]" ({error})'
        ) from error
