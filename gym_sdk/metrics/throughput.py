"""Rollouts and tokens per second: over the whole run, and lately."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Throughput"]

_BUCKETS = 60


@dataclass(slots=True)
class _Bucket:
    started: float
    rollouts: int = 0
    tokens: int = 0


class Throughput:
    """Counts what finished, in 60 buckets over the last `window_s` seconds.

    Args:
        window_s: what "lately" means. The window's rates are exact up to one bucket, 1/60 of it.
        clock: returns seconds; never goes backwards.
    """

    def __init__(self, window_s: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._started = clock()
        self._rollouts = 0
        self._tokens = 0
        self._buckets: deque[_Bucket] = deque()

    def add(self, tokens: int) -> None:
        """Count a rollout that finished now, and its generated tokens."""
        now = self._clock()
        buckets = self._buckets
        if not buckets or now - buckets[-1].started >= self._window_s / _BUCKETS:
            buckets.append(_Bucket(now))
            while now - buckets[0].started > self._window_s:
                buckets.popleft()
        bucket = buckets[-1]
        bucket.rollouts += 1
        bucket.tokens += tokens
        self._rollouts += 1
        self._tokens += tokens

    def metrics(self, duration_s: float | None = None) -> dict[str, float]:
        """Return the rates by name; none of a run that took no time.

        Args:
            duration_s: how long the run took, if it is over: then nothing happened lately.
        """
        now = self._clock()
        elapsed_s = now - self._started if duration_s is None else duration_s
        if elapsed_s <= 0.0:
            return {}
        rates = {
            "throughput/rollouts_per_s": self._rollouts / elapsed_s,
            "throughput/generated_tokens_per_s": self._tokens / elapsed_s,
        }
        if duration_s is None:
            window_s = min(self._window_s, elapsed_s)
            recent = [bucket for bucket in self._buckets if now - bucket.started <= self._window_s]
            rates["throughput/recent_rollouts_per_s"] = sum(b.rollouts for b in recent) / window_s
            rates["throughput/recent_generated_tokens_per_s"] = sum(b.tokens for b in recent) / window_s
        return rates
