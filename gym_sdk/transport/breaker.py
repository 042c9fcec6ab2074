"""A circuit breaker: a replica that is out gets no calls until it answers again."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import StrEnum

from gym_sdk.errors import ConfigurationError

__all__ = ["Breaker", "Circuit", "CircuitState"]

_CHANCE = 16
"""How many more failures in a row, at most, are put down to chance."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a replica is out, and how it comes back.

    Raises:
        ConfigurationError: a value is out of range.
    """

    failures: int = 3
    """Failures in a row, over all calls, that open the circuit; with many calls in flight as many more as
    their square root, up to 16, since some fail in a row by chance. Keep it below `Retry.attempts`: then a
    call that is alone waits for its server, too, instead of using up its tries."""
    probe_s: float = 1.0
    """Pause before the first probe; it doubles from probe to probe, with jitter."""
    max_probe_s: float = 15.0
    """Longest pause between two probes."""
    probe_deadline_s: float = 10.0
    """How long a probe may take."""
    patience_s: float = 120.0
    """How long calls wait while every replica is out, counted from when the last of them went out. Later
    calls fail at once, until a probe succeeds."""
    first_patience_s: float = 10.0
    """The same, as long as no replica has ever answered: whoever has a wrong address wants to know."""

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ConfigurationError(f"Breaker.failures must be at least 1, not {self.failures}")
        for name in ("probe_s", "max_probe_s", "probe_deadline_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"Breaker.{name} must be positive, not {getattr(self, name)}")
        for name in ("patience_s", "first_patience_s"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"Breaker.{name} must not be negative, not {getattr(self, name)}")


class CircuitState(StrEnum):
    """Whether a replica gets calls."""

    CLOSED = "closed"
    """It does."""
    OPEN = "open"
    """It does not; it is probed."""
    HALF_OPEN = "half_open"
    """A probe succeeded, so it does; but no call has succeeded since."""


class Circuit:
    """The state of one replica's circuit. Times are the event loop's: they never jump.

    Args:
        breaker: when it opens.
    """

    __slots__ = (
        "_breaker",
        "_pause_s",
        "down_since",
        "failed_in_row",
        "last_failure",
        "opened",
        "round",
        "state",
    )

    def __init__(self, breaker: Breaker) -> None:
        self.state = CircuitState.CLOSED
        self.round = 0
        """How often it has opened. A try that began in an earlier round says nothing about this one."""
        self.opened = 0
        """How many outages there were."""
        self.failed_in_row = 0
        self.last_failure = ""
        self.down_since: float | None = None
        """When the outage began that no call has ended yet."""
        self._breaker = breaker
        self._pause_s = breaker.probe_s

    def succeeded(self, began_in: int) -> bool:
        """Note that a try succeeded which began in that round; return whether this ends an outage."""
        if began_in != self.round:
            return False
        self.failed_in_row = 0
        if self.state is CircuitState.CLOSED:
            return False
        self.state = CircuitState.CLOSED
        self.down_since = None
        self._pause_s = self._breaker.probe_s
        return True

    def failed(self, began_in: int, why: str, now: float, *, in_flight: int = 0) -> bool:
        """Note that a try failed; return whether this opens the circuit.

        Args:
            began_in: the round in which the try began.
            why: the failure's message.
            now: the event loop's time.
            in_flight: how many other tries are under way.
        """
        self.last_failure = why
        if began_in != self.round or self.state is CircuitState.OPEN:
            return False
        self.failed_in_row += 1
        if self.failed_in_row < self._breaker.failures + min(_CHANCE, math.isqrt(in_flight)):
            return False
        self.state = CircuitState.OPEN
        self.round += 1
        if self.down_since is None:
            self.down_since = now
            self.opened += 1
        return True

    def probe_succeeded(self) -> None:
        """Let calls through again."""
        self.state = CircuitState.HALF_OPEN
        self.failed_in_row = 0

    def next_pause_s(self) -> float:
        """Return how long to wait before the next probe: between half and all of what doubles each time."""
        pause_s = min(self._pause_s, self._breaker.max_probe_s)
        self._pause_s = pause_s * 2.0
        return pause_s * random.uniform(0.5, 1.0)  # many clients must not knock at the same moment
