"""Everything about a rollout but its task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gym_sdk.environments import Environment
from gym_sdk.rollout.config import Deadlines, Limits, Sampling
from gym_sdk.rollout.requests import Prototypes
from gym_sdk.rollout.slots import Slots
from gym_sdk.rollout.staleness import WeightClock
from gym_sdk.schema import TokenForm
from gym_sdk.tools import Tool, resolve_tools
from gym_sdk.transport import Dispatch

__all__ = ["Gates", "RolloutSpec"]


@dataclass(slots=True)
class Gates:
    """What the rollouts of a stream share: how much runs at once."""

    model_calls: Slots | None = None
    tool_calls: Slots | None = None
    verifiers: Slots | None = None

    @classmethod
    def of(cls, limits: Limits) -> Gates:
        """Make the gates for these limits."""

        def slots(limit: int | None) -> Slots | None:
            return None if limit is None else Slots(limit)

        return cls(slots(limits.model_calls), slots(limits.tool_calls), slots(limits.verifiers))


@dataclass(slots=True)
class RolloutSpec:
    """Everything about a rollout but its task."""

    caller: Dispatch
    token_form: TokenForm = "item"
    model: str | None = None
    environment: Environment = field(default_factory=Environment)
    sampling: Sampling = field(default_factory=Sampling)
    deadlines: Deadlines = field(default_factory=Deadlines)
    limits: Limits = field(default_factory=Limits)
    gates: Gates = field(default_factory=Gates)
    clock: WeightClock | None = None
    """Tells how old weights are; None: that is not asked."""
    prototypes: Prototypes | None = field(default=None, init=False)
    """The requests of all rollouts that ask for nothing of their own; made when needed."""
    _tools: dict[str, Tool[..., Any]] | None = field(default=None, init=False)

    def tools_for(self, state: Any) -> dict[str, Tool[..., Any]]:
        """Return the tools of a rollout by name.

        Raises:
            ConfigurationError: as for `Environment.tools_for`.
        """
        if not self.environment.tools_are_fixed:
            return resolve_tools(self.environment.tools_for(state))
        if self._tools is None:
            self._tools = resolve_tools(self.environment.tools_for(None))
        return self._tools
