"""A training run to a checkpoint and back: what belongs to it besides model and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gym_sdk.errors import CheckpointError
from gym_sdk.grpo.checkpoints import Checkpoint, TrainerState, read_checkpoint, write_checkpoint
from gym_sdk.grpo.evaluation import EvaluationPlan
from gym_sdk.grpo.feed import Replay
from gym_sdk.grpo.learner import Learner
from gym_sdk.grpo.recorder import StepRecorder
from gym_sdk.grpo.tasks import TaskOrder
from gym_sdk.grpo.versions import WeightHistory, step_of, version_of

__all__ = ["Run", "RunProgress"]


@dataclass(slots=True)
class RunProgress:
    """How far a run is.

    Attributes:
        step: completed steps.
        position: batches of tasks drawn.
        history: the versions of its weights.
    """

    step: int = 0
    position: int = 0
    history: WeightHistory = dataclasses.field(default_factory=lambda: WeightHistory([version_of(0)]))


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of a run that a checkpoint holds.

    Attributes:
        learner: model, optimizer, reference policy.
        order: names the tasks.
        plan: the evaluations, if there are any.
        recorder: metrics and alarms.
        tokenizer_dir: a model folder whose tokenizer files go into the checkpoints.
    """

    learner: Learner
    order: TaskOrder
    plan: EvaluationPlan | None
    recorder: StepRecorder
    tokenizer_dir: Path | None

    def write(
        self, path: Path, progress: RunProgress, replay: Replay, random: Mapping[str, Any] | None
    ) -> None:
        """Write a checkpoint, with the random states given or the present ones. Blocking.

        Raises:
            CheckpointError: it cannot be written.
        """
        history = progress.history
        more: dict[str, Any] = {"weights": history.labels, "alarms": self.recorder.state()}
        score = best = None
        if self.plan is not None:
            more["evaluations"] = self.plan.state()
            stop = self.plan.early_stop
            best, score = stop.best_score, stop.last_score if stop.last_step == progress.step else None
        state = TrainerState(
            step=progress.step,
            position=progress.position,
            weight_step=step_of(history.newest),
            tasks=self.order.fingerprint,
            config=dataclasses.asdict(self.learner.config),
            score=score,
            best_score=best,
            more=more,
        )
        reference = self.learner.reference
        write_checkpoint(
            path,
            self.learner.model,
            state,
            optimizer=self.learner.optimizer,
            extra={} if reference is None else {"reference": reference.state_dict()},
            replay=replay,
            random=random,
            tokenizer_dir=self.tokenizer_dir,
        )

    def read(self, path: Path) -> tuple[RunProgress, Replay]:
        """Put everything back as it was in a checkpoint. Blocking. If it fails, nothing has changed.

        Raises:
            CheckpointError: it is damaged, of another model, or of another run.
        """
        checkpoint = read_checkpoint(path, self.learner.model, self.learner.optimizer)
        state = checkpoint.state
        if state.tasks != self.order.fingerprint:
            raise CheckpointError(
                "it was made with other tasks, or another seed or tasks_per_step: its position in them means "
                "nothing here. To start anew from its weights, load them as a model",
                path=path,
            )
        self._restore_reference(path, checkpoint)
        self.recorder.restore(state.step, state.more["alarms"])
        checkpoint.apply(self.learner.model, self.learner.optimizer)
        if self.plan is not None and "evaluations" in state.more:
            self.plan.restore(state.more["evaluations"])
        progress = RunProgress(state.step, state.position, WeightHistory(state.more["weights"]))
        return progress, checkpoint.replay

    def _restore_reference(self, path: Path, checkpoint: Checkpoint) -> None:
        reference = self.learner.reference
        if reference is None:
            return
        if "reference" not in checkpoint.extra:
            raise CheckpointError(
                "it has no reference policy, which loss.kl_coefficient needs: go on with 0, or start anew "
                "from its weights",
                path=path,
            )
        try:
            reference.load_state_dict(checkpoint.extra["reference"])
        except ValueError as error:
            raise CheckpointError(f"its reference policy does not fit: {error}", path=path) from error
