"""How much is kept of responses."""

from __future__ import annotations

from dataclasses import dataclass

from gym_sdk.errors import ConfigurationError

__all__ = ["StateLimits"]


@dataclass(frozen=True, slots=True)
class StateLimits:
    """How much is kept, and for how long.

    What goes is not found by its id any more. As part of what newer responses continue it stays, and counts,
    until the last of them has gone: a response that is kept can always be continued.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    max_bytes: int = 512 * 2**20
    """How much memory responses may take up, by an estimate; the least recently used go first. A store on
    disk has no such limit."""
    max_responses: int = 100_000
    """How many responses are kept. In memory the least recently used go first, on disk the oldest."""
    ttl_s: float = 30 * 86_400.0
    """How long a response is kept: 30 days, as OpenAI does."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"StateLimits.{name} must be positive, not {getattr(self, name)}")
