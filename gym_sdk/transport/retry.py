"""Bounded retries of infrastructure failures: exponential, with full jitter, honouring `Retry-After`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio

from gym_sdk.errors import ConfigurationError, TransportError

__all__ = ["Retry", "with_retries"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how fast to try again. Only retryable `TransportError`s are tried again.

    Raises:
        ConfigurationError: a value is out of range.
    """

    attempts: int = 4
    """Tries in all, the first included."""
    base_s: float = 0.5
    """Longest pause before the second try; it doubles from try to try."""
    max_s: float = 30.0
    """Longest pause, also where the server's `Retry-After` asks for more."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigurationError(f"Retry.attempts must be at least 1, not {self.attempts}")
        if self.base_s < 0 or self.max_s < 0:
            raise ConfigurationError("Retry.base_s and Retry.max_s must not be negative")

    def pause_s(self, failures: int, retry_after_s: float | None) -> float:
        """Return how long to wait after this many failures.

        The pause is uniform in [0, min(max_s, base_s * 2^(failures - 1))] ("full jitter"), and at least
        what the server asked for.
        """
        ceiling = min(self.max_s, self.base_s * 2.0 ** min(failures - 1, 30))
        pause = random.uniform(0.0, ceiling)
        return min(self.max_s, max(pause, retry_after_s or 0.0))


async def with_retries(call: Callable[[], Awaitable[T]], retry: Retry) -> tuple[T, int]:
    """Await `call()` until it succeeds, at most `retry.attempts` times.

    Returns:
        The result, and how many tries had failed before it.

    Raises:
        TransportError: the last failure, or the first that may not be retried.
    """
    failures = 0
    while True:
        try:
            return await call(), failures
        except TransportError as error:
            failures += 1
            if not error.retryable or failures >= retry.attempts:
                raise
            pause = retry.pause_s(failures, error.retry_after_s)
        await anyio.sleep(pause)
