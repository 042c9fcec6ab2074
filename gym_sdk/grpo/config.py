"""The trainer's settings: one frozen object, each field documented, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gym_sdk.errors import ConfigurationError

__all__ = ["GRPOConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """How `GRPOTrainer` trains.

    How many rollouts a group has is the rollout source's affair (`group_size=` of `client.rollouts`).

    Raises:
        ConfigurationError: a value is out of range; the message names the field.
    """

    learning_rate: float = 1e-6
    """AdamW's peak learning rate. The default suits full fine-tuning of models of 1 B parameters and more; a
    tiny policy (about 1 M) learns at 5e-4."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly; step s of them (from 1) runs at s / warmup_steps."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's divisor guard."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; applied to matrices, never to biases and norm weights."""
    max_grad_norm: float = 1.0
    """The gradient of each update is scaled down to this global norm."""
    clip_low: float = 0.2
    """Lower clip range: the probability ratio is clipped at `1 - clip_low`."""
    clip_high: float = 0.28
    """Upper clip range (DAPO's clip-higher): the probability ratio is clipped at `1 + clip_high`."""
    tis_cap: float | None = None
    """Truncated importance correction for the mismatch between engine and trainer. None: the loss's ratio is
    taken against the engine's log-probs, which are the behaviour policy. A number: the ratio is taken
    against the trainer's own log-probs before the step's first update, and each token is weighted by
    `min(trainer / engine, tis_cap)`; 2.0 is usual."""
    minibatches: int = 2
    """Updates in one pass over a step's rows. The split is by rollout groups, shuffled with `seed`, so that
    each update sees advantages that are centred; there are never more updates than groups."""
    epochs: int = 1
    """Passes over a step's rows."""
    tasks_per_step: int = 32
    """Tasks whose groups make one step; all tasks if there are fewer. The rest of an epoch that does not
    fill a step is left out; each epoch is shuffled anew, so it is another rest each time."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What `group_advantages` subtracts."""
    scale: Literal["std", "none"] = "std"
    """What `group_advantages` divides by."""
    min_valid_per_group: int = 2
    """Groups with fewer rollouts that have a reward are dropped and counted."""
    drop_zero_variance: bool = True
    """Whether groups whose rewards are all equal are dropped and counted. If kept, they add nothing to the
    gradient, but their tokens count in the loss's normaliser."""
    temperature: float = 1.0
    """The temperature that the rollouts were sampled at; log-probs are taken at it."""
    check_on_policy: bool = True
    """Whether to compare the log-probs of all trained rows before the first update with the engine's
    (`max_logprob_diff`, `token_mult_prob_error`, `gen_kl`). Costs a forward pass over the rows that are not
    in the first minibatch."""
    max_tokens_per_microbatch: int = 8192
    """Budget of one padded micro-batch, in tokens. It bounds memory and never changes the result."""
    seed: int = 0
    """Seeds the order of tasks and the split into minibatches."""
    max_steps: int | None = None
    """The iteration ends after this many steps, those before a resume included. None: never."""
    sync_timeout_s: float = 300.0
    """Deadline of one weight sync, in seconds."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "temperature", "sync_timeout_s"):
            self._require(name, 0.0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("minibatches", "epochs", "tasks_per_step", "max_tokens_per_microbatch"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "0 or positive")
        self._require("adam_betas", all(0.0 <= beta < 1.0 for beta in self.adam_betas), "in [0, 1)")
        self._require("clip_low", 0.0 < self.clip_low <= 1.0, "in (0, 1]")
        self._require("clip_high", 0.0 < self.clip_high < math.inf, "positive and finite")
        self._require("tis_cap", self.tis_cap is None or self.tis_cap > 0.0, "positive, or None for off")
        self._require("baseline", self.baseline in ("mean", "leave_one_out"), "'mean' or 'leave_one_out'")
        self._require("scale", self.scale in ("std", "none"), "'std' or 'none'")
        self._require("min_valid_per_group", self.min_valid_per_group >= 2, "at least 2")
        self._require("max_steps", self.max_steps is None or self.max_steps >= 0, "0 or more, or None")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigurationError(f"GRPOConfig.{name} must be {rule}, not {getattr(self, name)!r}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        if step >= self.warmup_steps:
            return self.learning_rate
        return self.learning_rate * step / self.warmup_steps
