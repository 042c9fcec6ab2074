"""When evaluations say that training should end."""

from __future__ import annotations

from typing import Any

from gym_sdk.grpo.evaluation.evaluation import Evaluation

__all__ = ["EarlyStop"]


class EarlyStop:
    """Remembers the best score of a training run, and says when to end it.

    Attributes:
        best_score: the best score so far; None before the first.
        best_step: the step whose weights reached it.
        without_improvement: evaluations with a score since then.
        last_score: the newest score.
        last_step: the step whose weights have it.

    Args:
        evaluation: whose `patience`, `target` and `min_delta` decide.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.without_improvement = 0
        self.last_score: float | None = None
        self.last_step: int | None = None

    def add(self, step: int, score: float | None) -> None:
        """Count an evaluation. It is the new best if `best_step` is its step.

        Args:
            step: how many steps were complete.
            score: `EvalResult.score`; None counts for nothing.
        """
        if score is None:
            return
        self.last_score, self.last_step = score, step
        if self.best_score is None or score > self.best_score + self._evaluation.min_delta:
            self.best_score, self.best_step, self.without_improvement = score, step, 0
        else:
            self.without_improvement += 1

    @property
    def stop_reason(self) -> str | None:
        """Why training should end now; None: it should go on."""
        if self.last_score is None:
            return None
        name, target, patience = self._evaluation.name, self._evaluation.target, self._evaluation.patience
        if target is not None and self.last_score >= target:
            return f"{name} reached its target: {self.last_score:.4g} >= {target:.4g}"
        if patience is not None and self.without_improvement >= patience:
            return (
                f"{name} has not improved in {self.without_improvement} evaluations: "
                f"{self.best_score:.4g} at step {self.best_step} is still the best"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes, as JSON values."""
        names = ("best_score", "best_step", "without_improvement", "last_score", "last_step")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where another one was.

        Args:
            state: what its `state()` returned.
        """
        for name in self.state():
            setattr(self, name, state[name])
