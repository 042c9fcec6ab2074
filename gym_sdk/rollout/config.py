"""How rollouts are sampled, limited and bounded in time."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import RolloutKey

__all__ = ["Deadlines", "Limits", "Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Request fields that decide what is sampled. None leaves a field to the server's default."""

    temperature: float | None = None
    """0 is greedy; the server's default is 1.0."""
    top_p: float | None = None
    """Nucleus sampling, in (0, 1]."""
    top_k: int | None = None
    """Only the k likeliest tokens; 0 turns it off."""
    max_output_tokens: int | None = None
    """Most tokens of one model call; the rest of the context by default."""
    seed: int | None = None
    """Makes rollouts repeatable. Each model call gets a seed of its own, made from this one, the task's id,
    the rollout's index, its epoch and the turn, so that the rollouts of a group differ."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further request fields, sent as they are, e.g. `{"chat_template_kwargs": {...}}`."""

    def fields(self) -> dict[str, Any]:
        """Return the request fields that all model calls have."""
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_output_tokens": self.max_output_tokens,
        }
        return {name: value for name, value in fields.items() if value is not None} | self.extra

    def seed_of(self, key: RolloutKey, turn: int) -> int | None:
        """Return the seed of one model call, or None if nothing was said about seeds."""
        if self.seed is None or "seed" in self.extra:
            return None
        epoch = f"@{key.epoch}" if key.epoch else ""
        text = f"{self.seed}/{key.task_id}{epoch}/{key.index}/{turn}".encode()
        return int.from_bytes(blake2b(text, digest_size=7).digest())


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each thing may take, in seconds. What runs out of time fails; it is never scored 0.

    Raises:
        ConfigurationError: a deadline is not positive.
    """

    rollout_s: float = 1800.0
    """One rollout: setup, model calls, tools and verifier."""
    model_call_s: float = 600.0
    """One try of one model call."""
    tool_s: float = 60.0
    """One tool call, unless the tool has its own deadline. Running out goes back to the model."""
    verifier_s: float = 120.0
    """One verification."""
    setup_s: float = 120.0
    """An environment's `setup`, and its `teardown`."""
    run_s: float | None = None
    """A whole stream: when it is over, rollouts in flight are cancelled, and iterating raises a
    `DeadlineError` after the groups that had finished. None: as long as it takes."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (value is None and name == "run_s") and not value > 0:
                raise ConfigurationError(f"Deadlines.{name} must be positive, not {value}")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much runs at once, and how long a rollout may get.

    Each limit holds for one stream. What waits for a place is served in the order in which its rollout was
    admitted, so that old groups finish before new ones go on.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    concurrency: int = 256
    """Rollouts in flight. A finished group that nobody has taken yet still holds one place."""
    max_turns: int = 16
    """Model calls of one rollout."""
    model_calls: int | None = None
    """Model calls in flight, their retries included; as many as there are rollouts by default."""
    tool_calls: int | None = None
    """Tool calls running; no limit of their own by default. Plain functions also share threads (see
    `docs/blocking.md`)."""
    verifiers: int | None = None
    """Verifiers running; no limit of their own by default."""
    tool_output_chars: int | None = 200_000
    """Longest output of a tool, in characters; the model is told what was cut. None: no limit."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"Limits.{name} must be at least 1, not {value}")
