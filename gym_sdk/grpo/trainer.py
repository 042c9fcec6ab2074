"""GRPO as an async iterator of steps: roll out, learn, sync the weights."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from transformers import PreTrainedModel

from gym_sdk.errors import CheckpointError, DeadlineError, GymError
from gym_sdk.grpo.checkpoint import TrainerState, read_checkpoint, write_checkpoint
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.learner import Learner
from gym_sdk.grpo.metrics import MetricsFile, rollout_metrics
from gym_sdk.grpo.selection import select_rows
from gym_sdk.grpo.sources import RolloutSource, collect
from gym_sdk.grpo.sync import WeightSync
from gym_sdk.grpo.tasks import TaskOrder
from gym_sdk.grpo.worker import Worker
from gym_sdk.schema import Group, Task
from gym_sdk.trackers import Tracker

__all__ = ["GRPOTrainer", "TrainStep"]

_log = logging.getLogger(__name__)

# NeMo RL's rule of thumb for `token_mult_prob_error`: beyond it, engine and trainer disagree.
_MAX_MISMATCH = 1.05


@dataclasses.dataclass(frozen=True, slots=True)
class TrainStep:
    """One step of training.

    Attributes:
        index: which step it was, from 1.
        metrics: its numbers (see `rollout_metrics`, `mismatch_metrics`, `update_metrics`), and
            `weight_version`, `seconds_rollout`, `seconds_train`, `seconds_sync`, `rollout_tokens_per_s`
            (sampled tokens) and `train_tokens_per_s` (all tokens of the trained rows). A step in which
            nothing was trainable has `updates` 0 and no numbers of updates.
        groups: the rollouts it learned from, in the order of its tasks.
        weight_version: the version of the weights after it.
        seconds: how long it took, in seconds.
    """

    index: int
    metrics: dict[str, float]
    groups: list[Group]
    weight_version: str
    seconds: float


class GRPOTrainer:
    """Trains a model on the rollouts of a policy that serves it: `async for step in trainer`.

    Each step draws tasks, rolls them out, trains on the groups, and pushes the new weights; between steps
    the caller has the floor (evaluate, save, stop). Torch runs in a thread, so the event loop stays
    alive. An iteration that ended by an error or by cancellation can be taken up again: steps count only once
    they are complete, a step that was cancelled before its first update changed nothing, one that
    was cancelled later is finished first, and weights that were not pushed are pushed before the next
    rollouts.

    `async with trainer` frees the thread at the end; it is optional.

    Args:
        model: a causal LM of transformers, on its device. The trainer changes it in place and owns it until
            it is closed. Dropout stays off, as in the engine.
        rollouts: where groups come from (see `RolloutSource`).
        tasks: what to train on; ids must be unique.
        sync: how new weights reach the engine. None: the engine shares the model's weights.
        config: the settings.
        output_dir: gets `metrics.jsonl`, a line for each step. None: nothing is written.
        tokenizer_dir: a model folder whose tokenizer files go into the checkpoints.
        tracker: gets the settings and each step's metrics; its owner closes it.

    Raises:
        ConfigurationError: no tasks, ids that occur twice, or a model that cannot be trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rollouts: RolloutSource,
        tasks: Sequence[Task],
        sync: WeightSync | None = None,
        config: GRPOConfig | None = None,
        output_dir: str | Path | None = None,
        tokenizer_dir: str | Path | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.config = config or GRPOConfig()
        self._tracker = tracker
        if tracker is not None:
            tracker.log_config(dataclasses.asdict(self.config))
        self.model = model
        self._rollouts = rollouts
        self._order = TaskOrder(tasks, per_batch=self.config.tasks_per_step, seed=self.config.seed)
        self._sync = sync
        self._learner = Learner(model, self.config)
        self._metrics_file = MetricsFile(Path(output_dir) / "metrics.jsonl") if output_dir else None
        self._tokenizer_dir = Path(tokenizer_dir) if tokenizer_dir else None
        self._worker = Worker()
        self._lock = anyio.Lock()
        self._closed = False
        self._step = 0
        self._position = 0
        self._weight_step = 0
        self._served_step: int | None = 0

    @property
    def step(self) -> int:
        """How many steps are complete."""
        return self._step

    @property
    def weight_version(self) -> str:
        """The version of the model's weights: named after the step that last changed them."""
        return f"step-{self._weight_step:06d}"

    async def __aenter__(self) -> Self:
        """Return the trainer."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the trainer."""
        await self.aclose()

    async def aclose(self) -> None:
        """Free the thread. The model stays as it is; the trainer takes no more steps.

        Waits for a step that runs in another task.
        """
        self._closed = True
        with anyio.CancelScope(shield=True):
            async with self._lock:
                self._worker.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TrainStep:
        """Run one step.

        Raises:
            GymError: all rollouts failed (the message has the most common failure), none came, a
                loss or gradient is not finite (that update was not applied), or the trainer is closed.
            TokenContractError: rollouts carry no token ids, or ids that the model does not have.
            DeadlineError: the weight sync did not finish in time.
        """
        async with self._lock:
            self._require_open()
            if self.config.max_steps is not None and self._step >= self.config.max_steps:
                raise StopAsyncIteration
            return await self._run_step()

    async def save(self, path: str | Path) -> None:
        """Write a checkpoint: a model folder that any tool loads, plus what is needed to resume exactly.

        It appears complete or not at all; one at the same path is replaced. Call it between steps.
        """
        async with self._lock:
            self._require_open()
            await self._worker.run(lambda _stop: self._save(Path(path)))

    async def load(self, path: str | Path) -> None:
        """Resume from a checkpoint: the next step is the one that would have come next.

        Model, optimizer, random states of the process (Python, torch, numpy if it is imported), step and
        position in the tasks are put back; the weights are pushed before the next rollouts; lines of later
        steps are removed from `metrics.jsonl`. If it fails, nothing has changed.

        Raises:
            CheckpointError: it is damaged, of another model, or of other tasks, batch size or seed.
        """
        async with self._lock:
            self._require_open()
            await self._worker.run(lambda _stop: self._load(Path(path)))

    def _save(self, path: Path) -> None:
        state = TrainerState(
            step=self._step,
            position=self._position,
            weight_step=self._weight_step,
            tasks=self._order.fingerprint,
            config=dataclasses.asdict(self.config),
        )
        write_checkpoint(path, self.model, self._learner.optimizer, state, tokenizer_dir=self._tokenizer_dir)

    def _load(self, path: Path) -> None:
        checkpoint = read_checkpoint(path, self.model, self._learner.optimizer)
        state = checkpoint.state
        if state.tasks != self._order.fingerprint:
            raise CheckpointError(
                "it was made with other tasks, or another seed or tasks_per_step: its position in them means "
                "nothing here. To start anew from its weights, load them as a model",
                path=path,
            )
        if self._metrics_file is not None:
            self._metrics_file.keep_until(state.step)
        checkpoint.apply(self.model, self._learner.optimizer)
        self._step, self._position, self._weight_step = state.step, state.position, state.weight_step
        self._served_step = None

    async def _run_step(self) -> TrainStep:
        await self._push()
        completed = self._step
        started = time.perf_counter()
        tasks = self._order.batch(self._position)
        groups = await collect(self._rollouts, tasks)
        rollout_s = time.perf_counter() - started
        _require_rewards(groups, step=completed + 1)
        metrics: dict[str, float] = {"seconds_rollout": rollout_s}
        try:
            await self._worker.run(lambda stop: self._learn(groups, metrics, stop))
            metrics["seconds_sync"] = await self._push()
        finally:
            # A step whose updates were made is complete, even if its caller left or the push failed.
            if self._step > completed:
                self._record(metrics)
        return TrainStep(self._step, metrics, groups, self.weight_version, time.perf_counter() - started)

    def _learn(self, groups: Sequence[Group], metrics: dict[str, float], stop: threading.Event) -> None:
        """Train on the groups, in the worker's thread; the step counts from the last line on."""
        step = self._step + 1
        started = time.perf_counter()
        selection = select_rows(
            groups, self.config, vocab_size=self.model.config.get_text_config().vocab_size
        )
        metrics |= rollout_metrics(groups, selection)
        metrics["rollout_tokens_per_s"] = metrics["generated_tokens"] / max(metrics["seconds_rollout"], 1e-9)
        if selection.trainable:
            updates = self._learner.updates
            try:
                metrics |= self._learner.learn(selection.groups, step=step, stop=stop)
            except BaseException:
                if self._learner.updates > updates:
                    self._served_step = None  # the engine has not seen what the model is now
                raise
            self._weight_step = step
        else:
            metrics |= {"updates": 0, "learning_rate": self.config.learning_rate_at(step)}
        metrics["weight_version"] = self._weight_step
        metrics["seconds_train"] = time.perf_counter() - started
        tokens = sum(len(row) for row in selection.trained_rows)
        metrics["train_tokens_per_s"] = tokens / metrics["seconds_train"]
        self._position += 1
        self._step = step

    async def _push(self) -> float:
        """Push the weights if the engine does not serve them yet; return how long it took, in seconds."""
        if self._sync is None or self._served_step == self._weight_step:
            return 0.0
        started = time.perf_counter()
        with anyio.move_on_after(self.config.sync_timeout_s) as scope:
            await self._sync.push(self.model, version=self.weight_version)
            self._served_step = self._weight_step
        if scope.cancelled_caught:
            raise DeadlineError(f"pushing weights {self.weight_version}", seconds=self.config.sync_timeout_s)
        return time.perf_counter() - started

    def _record(self, metrics: dict[str, float]) -> None:
        if self._metrics_file is not None:
            self._metrics_file.append(self._step, metrics)
        if self._tracker is not None:
            self._tracker.log(metrics, step=self._step)
        _log.debug("step %d: %s", self._step, metrics)
        if metrics.get("token_mult_prob_error", 1.0) > _MAX_MISMATCH:
            _log.warning(
                "step %d: token_mult_prob_error is %.3f: the trainer's log-probs are not the engine's. Check "
                "that the engine serves the pushed weights, and that both use the same temperature",
                self._step,
                metrics["token_mult_prob_error"],
            )

    def _require_open(self) -> None:
        if self._closed:
            raise GymError("the trainer is closed; make a new one (and load a checkpoint to go on)")


def _require_rewards(groups: Sequence[Group], *, step: int) -> None:
    """Stop a run that has nothing to learn from because its infrastructure is broken."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if any(rollout.ok for rollout in rollouts):
        return
    if not rollouts:
        raise GymError(f"step {step}: the rollout source returned no rollouts")
    causes = Counter(
        f"{rollout.failure.error} in {rollout.failure.where}: {rollout.failure.message}"
        if rollout.failure
        else f"outcome {rollout.outcome.value!r} without a reward (is there a verifier?)"
        for rollout in rollouts
    )
    cause, count = causes.most_common(1)[0]
    raise GymError(
        f"step {step}: none of the {len(rollouts)} rollouts has a reward; most often ({count} times): {cause}"
    )
