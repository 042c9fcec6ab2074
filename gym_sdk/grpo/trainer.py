"""GRPO as an async iterator of steps: roll out, learn, sync the weights."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError, DeadlineError, GymError
from gym_sdk.grpo.alarms import Alarm
from gym_sdk.grpo.checkpoints import CheckpointFolder, random_states
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.evaluation import EvalResult, Evaluation, EvaluationPlan
from gym_sdk.grpo.feed import BatchFeed
from gym_sdk.grpo.learner import Learner
from gym_sdk.grpo.metrics import rollout_metrics
from gym_sdk.grpo.models import vocab_size
from gym_sdk.grpo.optim import OptimizerFactory
from gym_sdk.grpo.recorder import StepRecorder
from gym_sdk.grpo.saving import Run, RunProgress
from gym_sdk.grpo.selection import select_rows
from gym_sdk.grpo.sources import RolloutSource, collect
from gym_sdk.grpo.step import TrainStep, require_rewards
from gym_sdk.grpo.sync import WeightSync
from gym_sdk.grpo.tasks import TaskOrder
from gym_sdk.grpo.versions import step_of, version_of
from gym_sdk.grpo.worker import Worker
from gym_sdk.schema import Group, Task
from gym_sdk.trackers import Tracker

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["GRPOTrainer"]

_log = logging.getLogger(__name__)


class GRPOTrainer:
    """Trains a model on the rollouts of a policy that serves it: `async for step in trainer`.

    Each step draws tasks, rolls them out, trains on the groups, and pushes the new weights; between steps
    the caller has the floor. Torch runs in a thread, so the event loop stays alive. An iteration that ended
    by an error or by cancellation can be taken up again: steps count only once they are complete, a step
    that was cancelled before its first update changed nothing, one that was cancelled later is finished
    first, and weights that were not pushed are pushed before the next rollouts.

    `async with trainer` ends what runs beside it, writes a last checkpoint and frees the thread. It is
    optional without `checkpoints` and `max_staleness`. Around it, `stop_on_signals()` makes of SIGTERM a
    checkpoint and a proper end.

    Args:
        model: a causal LM of transformers or a peft model of one, on its device. The trainer changes it in
            place and owns it until it is closed. Dropout stays off, as in the engine.
        rollouts: where groups come from (see `RolloutSource`).
        tasks: what to train on; ids must be unique.
        sync: how new weights reach the engine. None: the engine shares the model's weights.
        config: the settings.
        evaluations: what is evaluated between steps; the first decides on the best step and on stopping
            early.
        checkpoints: where checkpoints go, how often, and which stay; its owner closes it. None: only `save`
            writes any.
        optimizer: makes an optimizer of your own from parameter groups; None: `config.optimizer`'s.
        output_dir: gets `metrics.jsonl`, a line for each step. None: nothing is written.
        tokenizer_dir: a model folder whose tokenizer files go into the checkpoints.
        tracker: gets the settings and each step's metrics; its owner closes it.

    Attributes:
        stop_reason: why the iteration ends before `max_steps`; None if it does not.

    Raises:
        ConfigurationError: no tasks, ids that occur twice, a model that cannot be trained, or `max_staleness`
            without `sync`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        rollouts: RolloutSource,
        tasks: Sequence[Task],
        sync: WeightSync | None = None,
        config: GRPOConfig | None = None,
        evaluations: Sequence[Evaluation] = (),
        checkpoints: CheckpointFolder | None = None,
        optimizer: OptimizerFactory | None = None,
        output_dir: str | Path | None = None,
        tokenizer_dir: str | Path | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.config = config or GRPOConfig()
        self.model = model
        self._rollouts = rollouts
        self._order = TaskOrder(tasks, per_batch=self.config.tasks_per_step, seed=self.config.seed)
        self._sync = sync
        self._plan = EvaluationPlan(evaluations) if evaluations else None
        self._checkpoints = checkpoints
        self._feed = self._make_feed()
        self._learner = Learner(model, self.config, optimizer=optimizer)
        self._recorder = StepRecorder(self.config, output_dir=output_dir, tracker=tracker)
        self._run = Run(
            self._learner,
            self._order,
            self._plan,
            self._recorder,
            Path(tokenizer_dir) if tokenizer_dir else None,
        )
        self._worker = Worker()
        self._lock = anyio.Lock()
        self._entered = False
        self._closed = False
        self._progress = RunProgress()
        # rollouts that are made ahead need an engine that names its weights from the start
        self._served: str | None = self.weight_version if self._feed is None else None
        self._saved_step = 0
        self._between_steps = True
        self._is_unfinished = False
        self._random: dict[str, Any] | None = None
        """Random states of when the step began that is under way: it is sampled anew after a resume."""

    def _make_feed(self) -> BatchFeed | None:
        if self.config.max_staleness == 0:
            return None
        if self._sync is None:
            raise ConfigurationError(
                "max_staleness lets the policy sample while the model is trained, so it needs weights of its "
                "own: pass sync=, or set max_staleness=0"
            )
        return BatchFeed(self._rollouts, self._order, ahead=self.config.max_staleness)

    @property
    def step(self) -> int:
        """How many steps are complete."""
        return self._progress.step

    @property
    def weight_version(self) -> str:
        """The version of the model's weights: named after the step that last changed them."""
        return self._progress.history.newest

    @property
    def best_step(self) -> int | None:
        """The step whose weights were evaluated best so far; None before the first evaluation."""
        return self._plan.early_stop.best_step if self._plan else None

    @property
    def stop_reason(self) -> str | None:
        """Why the iteration ends before `max_steps`; None if it does not."""
        return self._plan.early_stop.stop_reason if self._plan else None

    async def __aenter__(self) -> Self:
        """Return the trainer."""
        self._entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the trainer."""
        await self.aclose()

    async def aclose(self) -> None:
        """End rollouts that run ahead, write a checkpoint if steps were made since the last, free the thread.

        The model stays as it is; the trainer takes no more steps. Waits for a step that runs in another task.

        Raises:
            CheckpointError: the checkpoint cannot be written.
        """
        self._closed = True
        with anyio.CancelScope(shield=True):
            async with self._lock:
                try:
                    if self._feed is not None:
                        await self._feed.aclose()
                    await self._save_last()
                finally:
                    self._worker.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TrainStep:
        """Run one step, and what is due after it: evaluations, a checkpoint.

        Raises:
            GymError: all rollouts failed (the message has the most common failure), none came, a
                loss or gradient is not finite (that update was not applied), or the trainer is closed.
            TokenContractError: rollouts carry no token ids, or ids that the model does not have.
            DeadlineError: the weight sync did not finish in time.
            CheckpointError: a checkpoint is due and cannot be written; the step itself is complete. Or
                `checkpoints` is not entered, or has checkpoints of later steps; then nothing was done.
        """
        async with self._lock:
            self._require_open()
            if self._feed is not None and not self._entered:
                raise ConfigurationError(
                    "with max_staleness, rollouts run beside the steps: use `async with`"
                )
            await self._finish_earlier_step()
            if self.stop_reason is not None:
                _log.info("training ends after step %d: %s", self._progress.step, self.stop_reason)
                raise StopAsyncIteration
            if self.config.max_steps is not None and self._progress.step >= self.config.max_steps:
                raise StopAsyncIteration
            if self._checkpoints is not None:
                self._checkpoints.path(self._progress.step + 1)  # refused now, and not after hours of work
            return await self._run_step()

    async def save(self, path: str | Path) -> None:
        """Write a checkpoint: a model folder that any tool loads, plus what is needed to resume exactly.

        It appears complete or not at all; one at the same path is replaced. Call it between steps.

        Raises:
            CheckpointError: it cannot be written.
        """
        async with self._lock:
            self._require_open()
            await self._save(Path(path))

    async def load(self, path: str | Path) -> None:
        """Resume from a checkpoint: the next step is the one that would have come next.

        Model, optimizer, reference policy, random states of the process (Python, torch, numpy if it is
        imported), step, position in the tasks, rollouts that were made ahead, evaluations and alarms are put
        back; the weights are pushed before the next rollouts; lines of later steps are removed from
        `metrics.jsonl`. If it fails, nothing has changed.

        Raises:
            CheckpointError: it is damaged, of another model, or of other tasks, batch size or seed.
        """
        async with self._lock:
            self._require_open()
            if self._feed is not None:
                await self._feed.aclose()
            await self._worker.run(lambda _stop: self._load(Path(path)))

    async def resume(self) -> int:
        """Load the newest checkpoint of `checkpoints`, if there is one; return how many steps are complete.

        Call it before the first step. Without a checkpoint, `metrics.jsonl` is begun anew: its lines are of a
        run that ended before its first checkpoint.

        Raises:
            ConfigurationError: the trainer has no `checkpoints`.
            CheckpointError: as for `load`.
        """
        if self._checkpoints is None:
            raise ConfigurationError("resume() needs checkpoints=CheckpointFolder(...)")
        newest = self._checkpoints.latest()
        if newest is not None:
            await self.load(newest)
        elif self._progress.step == 0:
            self._recorder.restart()
        return self._progress.step

    def _load(self, path: Path) -> None:
        """Put everything back, in the worker's thread: whoever waits may be cancelled, it is done whole."""
        self._progress, replay = self._run.read(path)
        if self._feed is not None:
            self._feed.restore(replay)
        self._served, self._saved_step, self._between_steps = None, self._progress.step, True
        self._is_unfinished, self._random = False, None

    # a step

    async def _run_step(self) -> TrainStep:
        await self._push()
        completed = self._progress.step
        started = time.perf_counter()
        self._random = random_states()
        groups = await self._groups()
        rollout_s = time.perf_counter() - started
        require_rewards(groups, step=completed + 1)
        metrics: dict[str, float] = {"seconds_rollout": rollout_s}
        evaluations: dict[str, EvalResult] = {}
        alarms: list[Alarm] = []
        try:
            await self._worker.run(lambda stop: self._learn(groups, metrics, stop))
            metrics["seconds_sync"] = await self._push()
            evaluations = await self._evaluate(metrics)
        finally:
            # A step whose updates were made is complete, even if its caller left or the push failed.
            if self._progress.step > completed:
                alarms = self._recorder.step(self._progress.step, metrics)
        await self._save_if_due()
        seconds = time.perf_counter() - started
        return TrainStep(
            self._progress.step, metrics, groups, self.weight_version, seconds, evaluations, alarms
        )

    async def _groups(self) -> list[Group]:
        if self._feed is not None:
            return await self._feed.take(self._progress.position)
        return await collect(self._rollouts, self._order.batch(self._progress.position))

    def _learn(self, groups: Sequence[Group], metrics: dict[str, float], stop: threading.Event) -> None:
        """Train on the groups, in the worker's thread; the step counts from the last line on."""
        step = self._progress.step + 1
        started = time.perf_counter()
        selection = select_rows(
            groups, self.config, vocab_size=vocab_size(self.model), history=self._progress.history
        )
        metrics |= rollout_metrics(groups, selection)
        metrics["rollout_tokens_per_s"] = metrics["generated_tokens"] / max(metrics["seconds_rollout"], 1e-9)
        if selection.trainable:
            updates = self._learner.updates
            try:
                metrics |= self._learner.learn(
                    selection.groups, step=step, stop=stop, history=self._progress.history
                )
            except BaseException:
                if self._learner.updates > updates:
                    self._served = None  # the engine has not seen what the model is now
                    self._between_steps = False
                raise
            self._progress.history.add(version_of(step))
        else:
            metrics |= {"updates": 0, "learning_rate": self.config.optimizer.learning_rate_at(step)}
        metrics["weight_version"] = step_of(self.weight_version)
        metrics["seconds_train"] = time.perf_counter() - started
        tokens = sum(len(row) for row in selection.trained_rows)
        metrics["train_tokens_per_s"] = tokens / metrics["seconds_train"]
        if self._feed is not None:
            self._feed.drop(self._progress.position)
        self._progress.position += 1
        self._progress.step = step
        self._between_steps = self._is_unfinished = True
        self._random = None

    async def _push(self) -> float:
        """Push the weights if the engine does not serve them yet; return how long it took, in seconds."""
        if self._sync is None or self._served == self.weight_version:
            return 0.0
        started = time.perf_counter()
        with anyio.move_on_after(self.config.sync_timeout_s) as scope:
            await self._sync.push(self.model, version=self.weight_version)
            self._served = self.weight_version
        if scope.cancelled_caught:
            raise DeadlineError(f"pushing weights {self.weight_version}", seconds=self.config.sync_timeout_s)
        return time.perf_counter() - started

    # after a step

    async def _evaluate(self, metrics: dict[str, float]) -> dict[str, EvalResult]:
        """Run the evaluations that are due, and add their numbers to the step's."""
        if self._plan is None:
            return {}
        results = await self._plan.run(self._progress.step, last_step=self.config.max_steps)
        for name, result in results.items():
            metrics |= result.metrics(name)
        return results

    async def _finish_earlier_step(self) -> None:
        """Evaluate the weights that training starts from, or do what a cancellation kept from being done."""
        metrics: dict[str, float] = {}
        if self._plan is not None:
            await self._push()
            await self._evaluate(metrics)
        if metrics:
            self._recorder.numbers(self._progress.step, metrics)
        if metrics or self._is_unfinished:
            await self._save_if_due()

    async def _save_if_due(self) -> None:
        """Save every so many steps, each new best, and again what was saved before it had its score."""
        self._is_unfinished = False
        step = self._progress.step
        if self._checkpoints is None or step == 0:
            return
        if self._checkpoints.is_due(step) or step in (self._best_to_keep, self._saved_step):
            await self._save_into(self._checkpoints)

    @property
    def _best_to_keep(self) -> int | None:
        return self.best_step if self._checkpoints is not None and self._checkpoints.keeps_best else None

    async def _save_last(self) -> None:
        if self._checkpoints is None or self._saved_step == self._progress.step:
            return
        if not self._between_steps:
            _log.warning(
                "no last checkpoint is written: step %d failed after some of its updates; go on from the "
                "newest one that is there",
                self._progress.step + 1,
            )
            return
        await self._save_into(self._checkpoints)

    async def _save_into(self, checkpoints: CheckpointFolder) -> None:
        await self._save(checkpoints.path(self._progress.step))
        self._saved_step = self._progress.step
        checkpoints.prune()

    async def _save(self, path: Path) -> None:
        replay = {} if self._feed is None else self._feed.finished
        random = self._random
        await self._worker.run(lambda _stop: self._run.write(path, self._progress, replay, random))

    def _require_open(self) -> None:
        if self._closed:
            raise GymError("the trainer is closed; make a new one (and load a checkpoint to go on)")
