"""What goes wrong in silence: tools that are never called, markup that never parses, prompts that drift."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from gym_sdk.schema import Rollout

__all__ = ["TokenWatch"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class TokenWatch:
    """Counts over the rollouts of a run, and a warning for each kind of silent failure, once.

    Attributes:
        patience: rollouts with tools on offer, and no call, before the warning. Those that were started first
            must be among them: who calls no tool is done sooner than who does.
        least_unparsed: pieces of tool-call markup that did not parse, and more than did, before the warning.
    """

    patience: int = 32
    least_unparsed: int = 8
    rollouts: int = 0
    model_calls: int = 0
    tool_rollouts: int = 0
    first_rollouts: int = 0
    tool_calls: int = 0
    unparsed_calls: int = 0
    forks: int = 0
    unreported_forks: int = 0
    lost_states: int = 0
    _warned_of: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rollouts: Iterable[Rollout]) -> TokenWatch:
        """Return the counts of these rollouts, without warnings."""
        watch = cls()
        for rollout in rollouts:
            watch.count(rollout)
        return watch

    def add(self, rollout: Rollout, *, order: int) -> None:
        """Count a finished rollout, and warn of what has become likely.

        Args:
            rollout: it.
            order: how many were started before it.
        """
        self.count(rollout)
        self.first_rollouts += order < self.patience
        if self.tool_calls == 0 and min(self.tool_rollouts, self.first_rollouts) >= self.patience:
            self._warn(
                "tools",
                "%d rollouts had tools on offer and none was called; does the chat template show them, and "
                "is the server's parser the right one (`gym-sdk check MODEL`)?",
                self.tool_rollouts,
            )
        if self.unparsed_calls >= self.least_unparsed and self.unparsed_calls > self.tool_calls:
            self._warn(
                "markup",
                "most tool-call markup does not parse and stays text (%d pieces, against %d calls); is the "
                "server's parser the right one (`gym-sdk check MODEL`)?",
                self.unparsed_calls,
                self.tool_calls,
            )
        if self.unreported_forks:
            self._warn(
                "drift",
                "a prompt did not extend what was sampled before it, and the server did not say why; it is "
                "trained as a row of its own; see `rollout.token_report()`",
            )

    def count(self, rollout: Rollout) -> None:
        """Count a finished rollout."""
        metrics = rollout.metrics
        self.rollouts += 1
        self.model_calls += len(rollout.model_calls)
        self.tool_rollouts += metrics.get("tools_offered", 0.0) > 0 and bool(rollout.model_calls)
        self.tool_calls += int(metrics.get("tool_calls", 0.0))
        self.unparsed_calls += int(metrics.get("unparsed_calls", 0.0))
        self.forks += int(metrics.get("forks", 0.0))
        self.unreported_forks += int(metrics.get("unreported_forks", 0.0))
        self.lost_states += int(metrics.get("lost_states", 0.0))

    def metrics(self) -> dict[str, float]:
        """Return the counts that are about tokens, by name."""
        names = ("forks", "unreported_forks", "unparsed_calls", "lost_states")
        return {name: float(getattr(self, name)) for name in names}

    def _warn(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._warned_of:
            self._warned_of |= {kind}
            _log.warning(message, *values)
