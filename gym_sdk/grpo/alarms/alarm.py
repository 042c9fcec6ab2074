"""One alarm, and the names that there are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Alarm", "AlarmName"]


class AlarmName(StrEnum):
    """What an alarm is about. The set is closed."""

    NOT_FINITE = "not_finite"
    """A metric is NaN or infinite."""
    MISMATCH = "mismatch"
    """The trainer's log-probs are not those of the engine."""
    POLICY_DRIFT = "policy_drift"
    """The policy moves far from the one that sampled."""
    CLIPPED = "clipped"
    """The loss clips many tokens."""
    GRAD_NORM_SPIKE = "grad_norm_spike"
    """The gradient is far greater than usual."""
    ENTROPY_COLLAPSE = "entropy_collapse"
    """The policy hardly explores any more."""
    FLAT_GROUPS = "flat_groups"
    """The rewards in most groups are all equal, so that there is nothing to learn from them."""
    DROPPED_GROUPS = "dropped_groups"
    """Groups are left out although their rewards differ, or would."""
    FAILED_ROLLOUTS = "failed_rollouts"
    """Rollouts fail for reasons that are not the policy's."""
    NO_TOOL_CALLS = "no_tool_calls"
    """Tools are on offer, and none is called."""
    UNPARSED_CALLS = "unparsed_calls"
    """Most of what looks like a tool call does not parse."""
    LENGTH_EXPLOSION = "length_explosion"
    """Generations are much longer than usual."""
    LENGTH_COLLAPSE = "length_collapse"
    """Generations are much shorter than usual."""
    TRUNCATED = "truncated"
    """Many rollouts reach a limit before their end."""
    FORKS = "forks"
    """Prompts do not extend what was sampled before them."""
    UNREPORTED_FORKS = "unreported_forks"
    """The same, and the server does not say why."""
    STALE = "stale"
    """Tokens are older than the bound allows."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that is likely wrong.

    Attributes:
        name: what it is about.
        message: what was found, the likely cause, and what to do.
        value: the number that is out of bounds.
        step: the step whose metrics show it.
    """

    name: AlarmName
    message: str
    value: float
    step: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.message}"
