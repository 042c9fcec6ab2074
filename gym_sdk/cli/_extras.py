"""Imports that need an extra, with an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gym_sdk.errors import ConfigurationError

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a missing package inside the block into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f'more packages are needed: pip install "gym-sdk[{extra}]" ({error})'
        ) from error
