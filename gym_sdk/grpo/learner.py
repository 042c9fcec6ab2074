"""One step of learning: rows in, updated weights and metrics out. Blocking; knows nothing of rollouts."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import GymError
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.losses import LossStats, loss_normaliser, policy_loss
from gym_sdk.grpo.metrics import learning_metrics, mismatch_metrics, staleness_metrics, token_ages
from gym_sdk.grpo.minibatches import micro_batches, minibatches
from gym_sdk.grpo.models import device_of, spare_embedding_gradient
from gym_sdk.grpo.optim import OptimizerFactory, autocast, enable_gradient_checkpointing, make_optimizer
from gym_sdk.grpo.packing import PackedBatch, TokenBatch, check_packing
from gym_sdk.grpo.reference import ReferencePolicy, make_reference
from gym_sdk.grpo.scoring import TokenScores, apply_fused_kernels, check_model, evaluating, token_log_probs
from gym_sdk.grpo.versions import WeightHistory
from gym_sdk.tokens import TokenSequence

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Learner", "LearningStoppedError"]


class LearningStoppedError(Exception):
    """The caller asked to stop before the first update of the step: nothing was changed."""


class _RowScores:
    """Log-probs of rows, each as long as the row has tokens with loss."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def keep(self, indices: Sequence[int], batch: PackedBatch | TokenBatch, log_probs: Tensor) -> None:
        """Keep what a micro-batch gave for its rows."""
        kept = log_probs.detach()[batch.loss_mask].cpu()
        sizes = batch.loss_mask.sum(1).tolist()
        self.values |= dict(zip(indices, kept.split(sizes), strict=True))

    def spread(
        self, indices: Sequence[int], batch: PackedBatch | TokenBatch
    ) -> Float[Tensor, "rows seq"] | None:
        """Return what was kept in the shape of a micro-batch; None if nothing was."""
        if not self.values:
            return None
        kept = torch.cat([self.values[index] for index in indices])
        spread = torch.zeros(batch.loss_mask.shape, dtype=kept.dtype, device=batch.loss_mask.device)
        spread[batch.loss_mask] = kept.to(spread.device)
        return spread


@dataclass(slots=True)
class _Step:
    """The work of one step and what its updates have added up to."""

    number: int
    rows: Sequence[TokenSequence]
    stop: threading.Event
    before: _RowScores = field(default_factory=_RowScores)
    """Log-probs before the first update."""
    reference: _RowScores = field(default_factory=_RowScores)
    stats: LossStats = field(default_factory=LossStats)
    grad_norms: list[float] = field(default_factory=list)
    computed_tokens: int = 0
    row_tokens: int = 0

    def require_going_on(self) -> None:
        """Stop here if that is asked for and nothing was changed yet."""
        if self.stop.is_set() and not self.grad_norms:
            raise LearningStoppedError

    def require_finite(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                applied = len(self.grad_norms)
                raise GymError(
                    f"{name} is {value} in update {applied + 1} of step {self.number}; the update was not "
                    f"applied ({applied} earlier of this step were). Look at the log-probs and rewards of "
                    "this step's rollouts, or lower the learning rate"
                )


class Learner:
    """Owns a model's optimizer and reference policy, and applies the updates of one step.

    `updates` counts the updates it has applied.

    Args:
        model: a causal LM of transformers or a peft model of one; changed in place. Parameters without
            `requires_grad` stay.
        config: the trainer's settings.
        optimizer: makes the optimizer of the model's parameter groups; None: `config.optimizer` says which.
            The learning rate of each step is that of `config.optimizer` in any case.

    Raises:
        ConfigurationError: the model's log-probs cannot be computed (`check_model`), or not on packed rows
            (`check_packing`), or it has nothing to train.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: GRPOConfig,
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        if config.fused_kernels:
            apply_fused_kernels(model)
        check_model(model)
        if config.pack:
            check_packing(model)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        spare_embedding_gradient(model)
        self.model = model
        self.config = config
        self.updates = 0
        self.optimizer = make_optimizer(model, config.optimizer, factory=optimizer)
        self.reference: ReferencePolicy | None = None
        if config.loss.needs_reference:
            self.reference = make_reference(
                model,
                config.reference,
                decay=config.reference_decay,
                refresh_every=config.reference_refresh_updates,
            )

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return device_of(self.model)

    def learn(
        self,
        groups: Sequence[Sequence[TokenSequence]],
        *,
        step: int,
        stop: threading.Event,
        history: WeightHistory | None = None,
    ) -> dict[str, float]:
        """Train on the rows of a step's groups.

        Setting `stop` ends it between two micro-batches as long as no update was applied; once the first
        one is, the step is finished, so that weights, optimizer and step count always belong together.

        Args:
            groups: the rows of each kept group, with advantages; at least one token carries loss.
            step: which step this is, from 1.
            stop: asks to end early.
            history: tells which tokens older weights sampled; None: none of them.

        Returns:
            The metrics of the updates and of the check against the engine.

        Raises:
            LearningStoppedError: it ended early; weights and optimizer are as before.
            GymError: a value is not finite; the update it belongs to was not applied.
        """
        config = self.config
        rows = [row for group in groups for row in group]
        plan = list(minibatches(groups, config, step))
        work = _Step(step, rows, stop)
        ages = _ages(rows, history)
        with evaluating(self.model):
            try:
                if config.check_on_policy or config.loss.needs_proximal:
                    # The first update's own forward pass is before any update: only the rest needs one.
                    first = set(plan[0])
                    self._score(work, [index for index in range(len(rows)) if index not in first])
                if self.reference is not None:
                    self._score_reference(work)
                for indices in plan:
                    self._update(work, indices, ages)
            finally:
                self.optimizer.zero_grad(set_to_none=True)
        metrics = learning_metrics(work.stats, work.grad_norms) | staleness_metrics(rows, ages)
        metrics["learning_rate"] = config.optimizer.learning_rate_at(step)
        metrics["shared_tokens_share"] = 1.0 - work.computed_tokens / work.row_tokens
        if config.check_on_policy:
            before = [work.before.values[index] for index in range(len(rows))]
            metrics |= mismatch_metrics(before, rows, ages=ages)
        return metrics

    def _score(self, work: _Step, indices: Sequence[int]) -> None:
        """Take the log-probs of some rows before the first update."""
        with torch.no_grad():
            for micro, batch in micro_batches(work.rows, indices, self.config, self.device):
                work.require_going_on()
                log_probs = self._scores(self.model, batch).log_probs
                work.require_finite(log_probs=float(log_probs.sum()))
                work.before.keep(micro, batch, log_probs)

    def _score_reference(self, work: _Step) -> None:
        """Take the log-probs of all rows under the reference policy."""
        assert self.reference is not None
        everything = range(len(work.rows))
        with torch.no_grad(), self.reference.scoring() as reference, evaluating(reference):
            for micro, batch in micro_batches(work.rows, everything, self.config, self.device):
                work.require_going_on()
                log_probs = self._scores(reference, batch).log_probs
                work.require_finite(reference_log_probs=float(log_probs.sum()))
                work.reference.keep(micro, batch, log_probs)

    def _scores(
        self,
        model: PreTrainedModel | PeftModel,
        batch: PackedBatch | TokenBatch,
        *,
        with_entropy: bool = False,
    ) -> TokenScores:
        with autocast(self.device, self.config.precision):
            return token_log_probs(
                model,
                batch,
                temperature=self.config.temperature,
                with_entropy=with_entropy,
                entropy_gradient=with_entropy and self.config.loss.needs_entropy_gradient,
                in_place=True,
            )

    def _update(self, work: _Step, indices: Sequence[int], ages: Sequence[Int[Tensor, " seq"]]) -> None:
        """Accumulate the gradient of one minibatch over its micro-batches and apply it."""
        normaliser = loss_normaliser([work.rows[index].trained_tokens for index in indices], self.config.loss)
        stats = LossStats()
        for micro, batch in micro_batches(work.rows, indices, self.config, self.device):
            work.require_going_on()
            stats += self._backward(work, micro, batch, ages, normaliser)
        work.require_going_on()
        norm = self._clip_gradient()
        work.require_finite(loss=stats.loss, grad_norm=norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate_at(work.number)
        self.optimizer.step()
        self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.reference is not None:
            self.reference.after_update(self.model)
        work.stats += stats
        work.grad_norms.append(norm)

    def _backward(
        self,
        work: _Step,
        micro: Sequence[int],
        batch: PackedBatch | TokenBatch,
        ages: Sequence[Int[Tensor, " seq"]],
        normaliser: float,
    ) -> LossStats:
        """Add one micro-batch's gradient."""
        scores = self._scores(self.model, batch, with_entropy=True)
        if not work.grad_norms:
            work.before.keep(micro, batch, scores.log_probs)
        loss, stats = policy_loss(
            scores.log_probs,
            batch.behaviour_log_probs,
            batch.advantages,
            batch.loss_mask,
            normaliser=normaliser,
            config=self.config.loss,
            proximal_log_probs=work.before.spread(micro, batch) if self.config.loss.needs_proximal else None,
            reference_log_probs=work.reference.spread(micro, batch),
            entropy=scores.entropy,
            on_policy=_on_policy(
                [ages[index] for index in micro], [work.rows[index] for index in micro], batch
            ),
        )
        loss.backward()
        work.computed_tokens += batch.input_ids.numel()
        work.row_tokens += sum(len(work.rows[index]) for index in micro)
        return stats

    def _clip_gradient(self) -> float:
        trained = (parameter for parameter in self.model.parameters() if parameter.grad is not None)
        return float(torch.nn.utils.clip_grad_norm_(trained, self.config.optimizer.max_grad_norm))


def _ages(rows: Sequence[TokenSequence], history: WeightHistory | None) -> list[Int[Tensor, " seq"]]:
    if history is None:
        return token_ages(rows, version=0, number_of=lambda _: None)
    return token_ages(rows, version=history.now, number_of=history.number_of)


def _on_policy(
    ages: Sequence[Int[Tensor, " seq"]], rows: Sequence[TokenSequence], batch: PackedBatch | TokenBatch
) -> Bool[Tensor, "rows seq"] | None:
    """Mark the tokens that are not known to be older than the weights; None if all are, as is usual."""
    stale = torch.cat(list(ages)) > 0
    if not stale.any():
        return None
    trained = torch.tensor([flag for row in rows for flag in row.loss_mask], dtype=torch.bool)
    marked = batch.loss_mask.clone()
    marked[batch.loss_mask] = ~stale[trained].to(marked.device)
    return marked
