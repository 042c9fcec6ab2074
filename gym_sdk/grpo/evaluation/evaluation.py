"""Rollouts of tasks that are not trained on, between the steps of training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import anyio

from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.grpo.evaluation.result import EvalResult, most_common_failure
from gym_sdk.grpo.sources import RolloutSource, in_order
from gym_sdk.schema import Group, Outcome, Task

__all__ = ["Evaluation", "evaluate"]

_log = logging.getLogger(__name__)


async def evaluate(
    rollouts: RolloutSource, tasks: Sequence[Task], *, threshold: float = 1.0, timeout_s: float | None = None
) -> EvalResult:
    """Roll out tasks and average their rewards.

    Rollouts without reward (failed, cancelled) are counted in `outcomes` and stay out of the mean.
    Tasks are the unit of the standard error, because rollouts of one task are not independent.
    If no rollout has a reward, the result's `failure` has the most common reason.

    Args:
        rollouts: as for `GRPOTrainer`.
        tasks: what to evaluate on.
        threshold: a rollout is correct from this reward on; for `pass_at`.
        timeout_s: deadline in seconds; what has not finished by then is cancelled, and the result has a
            `failure`. None: the rollouts' own deadlines are enough.

    Raises:
        ConfigurationError: a reward is not finite.
    """
    started = time.perf_counter()
    groups: list[Group] = []
    with anyio.move_on_after(timeout_s) as scope:
        async with rollouts(tasks) as stream:
            async for group in stream:
                groups.append(group)  # noqa: PERF401 - what was there before the deadline stays
    failure = None
    if scope.cancelled_caught:
        failure = f"it did not finish within {timeout_s:g} s ({len(groups)} of {len(tasks)} groups did)"
    seconds = time.perf_counter() - started
    result = EvalResult.of(in_order(groups, tasks), threshold=threshold, seconds=seconds)
    if failure is None and result.mean_reward is None:
        failure = f"no rollout has a reward; {most_common_failure(groups)}"
    return replace(result, failure=failure)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation that a trainer runs between its steps.

    Of several, the first decides on the best step and on stopping early.

    **Failures of infrastructure are no scores.** If the deadline passes, the policy cannot be reached, or too
    few rollouts have a reward, the result says why (`EvalResult.failure`) and is warned of; it can neither be
    the best nor use up patience, and training goes on.

    Raises:
        ConfigurationError: a value is out of range; the message names the field.
    """

    rollouts: RolloutSource
    """Where groups come from, with a group size and sampling settings of its own: `partial(client.rollouts,
    tools=..., verifier=..., group_size=4)`."""
    tasks: Sequence[Task]
    """What to evaluate on; none of them should be trained on."""
    _: KW_ONLY
    every: int = 10
    """Steps from one evaluation to the next; the last step (`max_steps`) is evaluated in any case."""
    at_start: bool = True
    """Whether the weights are evaluated before the first step."""
    name: str = "eval"
    """Its metrics are logged as `NAME/...`."""
    patience: int | None = None
    """Training stops after so many evaluations in a row without a new best score. None: never."""
    target: float | None = None
    """Training stops at a score that reaches this. None: never."""
    min_delta: float = 0.0
    """A score is the new best if it exceeds the best by more than this. One standard error keeps chance
    from choosing."""
    threshold: float = 1.0
    """A rollout is correct from this reward on; for pass@k."""
    min_valid_share: float = 0.9
    """With a smaller share of rollouts that have a reward there is no score: a few that did not fail say
    little, and not about the same tasks as the last time. Cancelled rollouts (over-sampled groups) are left
    out of the share."""
    timeout_s: float = 3600.0
    """Deadline of one evaluation, in seconds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        self._require("tasks", len(self.tasks) > 0, "at least one task")
        self._require("every", self.every >= 1, "at least 1")
        self._require("name", bool(self.name) and "/" not in self.name, "a word without '/'")
        self._require("patience", self.patience is None or self.patience >= 1, "at least 1, or None for off")
        self._require("target", self.target is None or math.isfinite(self.target), "finite, or None for off")
        self._require("min_delta", 0.0 <= self.min_delta < math.inf, "0 or positive, and finite")
        self._require("threshold", math.isfinite(self.threshold), "finite")
        self._require("min_valid_share", 0.0 < self.min_valid_share <= 1.0, "in (0, 1]")
        self._require("timeout_s", 0.0 < self.timeout_s < math.inf, "positive and finite")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigurationError(f"Evaluation.{name} must be {rule}, not {getattr(self, name)!r}")

    def is_due(self, step: int, *, last_step: int | None = None) -> bool:
        """Whether to evaluate the weights as they are after a step.

        Args:
            step: how many steps are complete; 0 before the first.
            last_step: the step after which training ends, if that is known.
        """
        if step == 0:
            return self.at_start
        return step % self.every == 0 or step == last_step

    async def run(self, step: int) -> EvalResult:
        """Evaluate the policy as it is served now.

        Args:
            step: after which one, for the warning.

        Raises:
            ConfigurationError: a reward is not finite.
        """
        try:
            result = await evaluate(
                self.rollouts, self.tasks, threshold=self.threshold, timeout_s=self.timeout_s
            )
        except TransportError as error:
            result = replace(EvalResult.of([]), failure=f"the policy was not reached: {error}")
        expected = result.rollouts - result.outcomes.get(Outcome.CANCELLED, 0)
        if result.failure is None and result.valid < self.min_valid_share * expected:
            reason = most_common_failure(result.groups)
            result = replace(
                result, failure=f"only {result.valid} of {expected} rollouts have a reward; {reason}"
            )
        if result.failure is not None:
            _log.warning(
                "step %d: %s has no score and counts for nothing: %s", step, self.name, result.failure
            )
        return result
