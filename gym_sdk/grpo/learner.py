"""One step of learning: rows in, updated weights and metrics out. Blocking; knows nothing of rollouts."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import GymError
from gym_sdk.grpo.batch import TokenBatch, pad_rows, to_tensors
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.logprobs import check_model, evaluating, token_log_probs
from gym_sdk.grpo.loss import LossStats, policy_loss
from gym_sdk.grpo.metrics import mismatch_metrics, update_metrics
from gym_sdk.tokens import TokenSequence, pack_by_budget

__all__ = ["Learner", "LearningStoppedError"]


class LearningStoppedError(Exception):
    """The caller asked to stop before the first update of the step: nothing was changed."""


@dataclass(slots=True)
class _Progress:
    """What the updates of one step have added up to."""

    stats: LossStats = field(default_factory=LossStats)
    entropy: float = 0.0
    grad_norms: list[float] = field(default_factory=list)
    before: dict[int, Tensor] = field(default_factory=dict)
    """Log-probs of each row before the first update, by the row's index."""


class Learner:
    """Owns a model's optimizer and applies the updates of one step.

    `updates` counts the updates it has applied.

    Args:
        model: a causal LM of transformers; changed in place. Parameters without `requires_grad` stay.
        config: the trainer's settings.

    Raises:
        ConfigurationError: the model's log-probs cannot be computed (see `check_model`).
    """

    def __init__(self, model: PreTrainedModel, config: GRPOConfig) -> None:
        check_model(model)
        self.model = model
        self.config = config
        self.updates = 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
        )

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def learn(
        self, groups: Sequence[Sequence[TokenSequence]], *, step: int, stop: threading.Event
    ) -> dict[str, float]:
        """Train on the rows of a step's groups.

        Setting `stop` ends it between two micro-batches as long as no update was applied; once the first
        one is, the step is finished, so that weights, optimizer and step count always belong together.

        Args:
            groups: the rows of each kept group, with advantages; at least one token carries loss.
            step: which step this is, from 1.
            stop: asks to end early.

        Returns:
            The metrics of the updates and of the check against the engine.

        Raises:
            LearningStoppedError: it ended early; weights and optimizer are as before.
            GymError: a value is not finite; the update it belongs to was not applied.
        """
        rows = [row for group in groups for row in group]
        config = self.config
        minibatches = list(self._minibatches(groups, step))
        progress = _Progress()
        with evaluating(self.model):
            try:
                if config.check_on_policy or config.tis_cap is not None:
                    # The first update's own forward pass is on-policy: only the rest needs one more.
                    first = set(minibatches[0])
                    rest = [index for index in range(len(rows)) if index not in first]
                    self._score(rows, rest, step, stop, progress.before)
                for indices in minibatches:
                    self._update(rows, indices, step, stop, progress)
            finally:
                self.optimizer.zero_grad(set_to_none=True)
        metrics = update_metrics(progress.stats, progress.entropy, progress.grad_norms)
        metrics["learning_rate"] = config.learning_rate_at(step)
        if config.check_on_policy:
            metrics |= mismatch_metrics([progress.before[index] for index in range(len(rows))], rows)
        return metrics

    def _score(
        self,
        rows: Sequence[TokenSequence],
        indices: Sequence[int],
        step: int,
        stop: threading.Event,
        scores: dict[int, Tensor],
    ) -> None:
        """Add the current log-probs of some rows to `scores`."""
        with torch.no_grad():
            for micro, batch in self._micro_batches(rows, indices):
                if stop.is_set():
                    raise LearningStoppedError
                log_probs = token_log_probs(self.model, batch, temperature=self.config.temperature).log_probs
                self._require_finite({"log_probs": float(log_probs.sum())}, step, applied=0)
                _keep(scores, rows, micro, log_probs)

    def _minibatches(self, groups: Sequence[Sequence[TokenSequence]], step: int) -> Iterator[list[int]]:
        """Yield the row indices of each update: whole groups, shuffled anew in each epoch."""
        members: list[range] = []
        for group in groups:
            first = members[-1].stop if members else 0
            members.append(range(first, first + len(group)))
        for epoch in range(self.config.epochs):
            order = list(members)
            random.Random(f"{self.config.seed}:{step}:{epoch}").shuffle(order)
            count = min(self.config.minibatches, len(order))
            for part in range(count):
                chosen = order[part * len(order) // count : (part + 1) * len(order) // count]
                yield [index for group_rows in chosen for index in group_rows]

    def _micro_batches(
        self, rows: Sequence[TokenSequence], indices: Sequence[int]
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        budget = self.config.max_tokens_per_microbatch
        for packed in pack_by_budget([len(rows[index]) for index in indices], budget):
            micro = [indices[position] for position in packed]
            yield micro, to_tensors([rows[index] for index in micro], self.device)

    def _update(
        self,
        rows: Sequence[TokenSequence],
        indices: Sequence[int],
        step: int,
        stop: threading.Event,
        progress: _Progress,
    ) -> None:
        """Accumulate the gradient of one minibatch over its micro-batches and apply it."""
        config = self.config
        applied = len(progress.grad_norms)
        tokens = sum(rows[index].trained_tokens for index in indices)
        stats, entropy = LossStats(), 0.0
        for micro, batch in self._micro_batches(rows, indices):
            if stop.is_set() and not applied:
                raise LearningStoppedError
            scores = token_log_probs(self.model, batch, temperature=config.temperature, with_entropy=True)
            if not applied:
                _keep(progress.before, rows, micro, scores.log_probs.detach())
            proximal = None
            if config.tis_cap is not None:
                width = batch.input_ids.shape[1]
                proximal = pad_rows([progress.before[index] for index in micro], width).to(self.device)
            loss, part = policy_loss(
                scores.log_probs,
                batch.behaviour_log_probs,
                batch.advantages,
                batch.loss_mask,
                normaliser=tokens,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                proximal_log_probs=proximal,
                tis_cap=config.tis_cap,
            )
            loss.backward()
            stats += part
            entropy += 0.0 if scores.entropy is None else float(scores.entropy.sum())
        if stop.is_set() and not applied:
            raise LearningStoppedError
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        self._require_finite({"loss": stats.loss, "grad_norm": norm}, step, applied)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        self.optimizer.step()
        self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        progress.stats += stats
        progress.entropy += entropy
        progress.grad_norms.append(norm)

    @staticmethod
    def _require_finite(values: dict[str, float], step: int, applied: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise GymError(
                    f"{name} is {value} in update {applied + 1} of step {step}; the update was not applied "
                    f"({applied} earlier of this step were). Look at the log-probs and rewards of this "
                    "step's rollouts, or lower the learning rate"
                )


def _keep(
    scores: dict[int, Tensor], rows: Sequence[TokenSequence], micro: Sequence[int], values: Tensor
) -> None:
    """Keep the log-probs of a micro-batch's rows, without the padding."""
    for index, row_values in zip(micro, values.cpu(), strict=True):
        scores[index] = row_values[: len(rows[index])]
