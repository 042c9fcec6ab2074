"""The evaluations of a training run: which are due, and which of them decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.evaluation.early_stop import EarlyStop
from gym_sdk.grpo.evaluation.evaluation import Evaluation
from gym_sdk.grpo.evaluation.result import EvalResult

__all__ = ["EvaluationPlan"]

_log = logging.getLogger(__name__)


class EvaluationPlan:
    """Runs the evaluations that are due after a step, each once, also across a resume.

    Attributes:
        evaluations: in the order in which they run; the first decides on the best step and on stopping.
        early_stop: what the first has come to.

    Args:
        evaluations: at least one, with different names.

    Raises:
        ConfigurationError: there is none, a name occurs twice, or one that does not decide has a `patience`,
            `target` or `min_delta`.
    """

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        if not evaluations:
            raise ConfigurationError("a plan needs at least one evaluation")
        names = [evaluation.name for evaluation in evaluations]
        for evaluation in evaluations:
            if names.count(evaluation.name) > 1:
                raise ConfigurationError(
                    f"two evaluations have the name {evaluation.name!r}, so that their metrics would be "
                    "mixed up; give one of them another name"
                )
        for evaluation in evaluations[1:]:
            if evaluation.patience is not None or evaluation.target is not None or evaluation.min_delta:
                raise ConfigurationError(
                    f"only the first evaluation ({names[0]!r}) decides on the best step and on stopping; put "
                    f"{evaluation.name!r} first, or leave out its patience, target and min_delta"
                )
        self.evaluations = tuple(evaluations)
        self.early_stop = EarlyStop(self.evaluations[0])
        self._done: dict[str, int] = {}

    async def run(self, step: int, *, last_step: int | None = None) -> dict[str, EvalResult]:
        """Run what is due after a step and was not run yet; return the results by name.

        If it is cancelled, another call for the same step goes on with what is left.

        Args:
            step: how many steps are complete; the policy must serve the weights of that step.
            last_step: the step after which training ends, if that is known; it is evaluated in any case.

        Raises:
            ConfigurationError: a reward is not finite.
        """
        results = {}
        for evaluation in self.evaluations:
            name = evaluation.name
            if self._done.get(name) == step or not evaluation.is_due(step, last_step=last_step):
                continue
            results[name] = result = await evaluation.run(step)
            self._done[name] = step
            if evaluation is self.evaluations[0]:
                self.early_stop.add(step, result.score)
        return results

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON values."""
        name = self.evaluations[0].name
        return {"decides": name, "early_stop": self.early_stop.state(), "done": dict(self._done)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where another plan was.

        If another evaluation decided there, its best score means nothing here: that is warned of, and the
        best is looked for anew.

        Args:
            state: what its `state()` returned.
        """
        self._done = dict(state["done"])
        self.early_stop = EarlyStop(self.evaluations[0])
        name = self.evaluations[0].name
        if state["decides"] == name:
            self.early_stop.restore(state["early_stop"])
        else:
            _log.warning(
                "the best step so far was that of the evaluation %r; now %r decides, and finds a new one",
                state["decides"],
                name,
            )
