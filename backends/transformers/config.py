"""Limits of the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass

from gym_sdk.errors import ConfigurationError

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one `TransformersEngine` uses the machine.

    Attributes:
        context_length: most tokens of prompt and generation together; None: what the model is made for.
        max_running: most requests that hold a slot at a time; more wait in line.
        prefill_tokens: most prompt tokens computed in one step, so that a long prompt does not hold up the
            requests that are decoding beside it.
        prefix_reuse: whether keys and values already computed for the same leading tokens are copied
            instead of computed: the shared prompt of a group, the history of a next turn.
        max_cache_tokens: most token positions that the cache may hold (rows times the longest row, both
            rounded up to a power of two); when it is reached, the newest requests give their slot back and
            are recomputed later. None: no limit.
        close_timeout_s: how long `aclose` waits for the step in progress.

    Raises:
        ConfigurationError: a value is out of range.
    """

    context_length: int | None = None
    max_running: int = 256
    prefill_tokens: int = 2048
    prefix_reuse: bool = True
    max_cache_tokens: int | None = None
    close_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("context_length", "max_running", "prefill_tokens", "max_cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if self.close_timeout_s <= 0:
            raise ConfigurationError(f"close_timeout_s must be positive, not {self.close_timeout_s}")
