"""Bounded retries of infrastructure failures: exponential, with full jitter, honouring `Retry-After`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio

from gym_sdk.errors import ConfigurationError, TransportError

__all__ = ["Retry", "RetryBudget", "with_retries"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how fast to try again. Only retryable `TransportError`s are tried again.

    Raises:
        ConfigurationError: a value is out of range.
    """

    attempts: int = 4
    """Tries in all, the first included; not counting those that a replica's outage or 429 took."""
    base_s: float = 0.5
    """Longest pause before the second try; it doubles from try to try."""
    max_s: float = 30.0
    """Longest pause, also where the server's `Retry-After` asks for more."""
    budget: float = 0.2
    """Retries that each answered call earns for all calls of the client: their share in the long run."""
    reserve: float = 50.0
    """Retries that are there at the beginning, and the most that are saved up."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigurationError(f"Retry.attempts must be at least 1, not {self.attempts}")
        for name in ("base_s", "max_s", "budget", "reserve"):
            # written so that NaN is refused, too
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"Retry.{name} must not be negative, not {getattr(self, name)}")

    def pause_s(self, failures: int, retry_after_s: float | None) -> float:
        """Return how long to wait after this many failures.

        The pause is uniform in [0, min(max_s, base_s * 2^(failures - 1))] ("full jitter"), and at least
        what the server asked for.
        """
        ceiling = min(self.max_s, self.base_s * 2.0 ** min(failures - 1, 30))
        pause = random.uniform(0.0, ceiling)
        return min(self.max_s, max(pause, retry_after_s or 0.0))


class RetryBudget:
    """What keeps retries from multiplying the load on a server that fails: a bucket of tokens.

    Each call that is answered adds `Retry.budget`, each retry takes one. Calls that begin add nothing: many
    begin at once, and the bucket would have run over by the time that some of them fail. It knows no clock,
    so that no jump of one matters.

    Args:
        retry: how much a call earns, and how much is there at the beginning.
    """

    __slots__ = ("_earned", "_most", "tokens")

    def __init__(self, retry: Retry) -> None:
        self.tokens = self._most = retry.reserve
        self._earned = retry.budget

    def earn(self) -> None:
        """Note a call that was answered."""
        tokens = self.tokens + self._earned
        self.tokens = tokens if tokens < self._most else self._most

    def take(self) -> bool:
        """Take a retry out of the budget; return whether there was one."""
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


async def with_retries(call: Callable[[], Awaitable[T]], retry: Retry) -> tuple[T, int]:
    """Await `call()` until it succeeds, at most `retry.attempts` times.

    It has no budget: it is for a few calls, as those about captures are. `Dispatch` is for many.

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
