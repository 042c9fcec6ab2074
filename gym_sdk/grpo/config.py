"""The trainer's settings: one frozen object, each field documented, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.alarms import AlarmConfig
from gym_sdk.grpo.losses import LossConfig
from gym_sdk.grpo.optim import OptimizerConfig

__all__ = ["GRPOConfig"]

_CHOICES = {
    "baseline": ("mean", "leave_one_out"),
    "scale": ("std", "none", "batch"),
    "overlong": ("keep", "mask"),
    "reference": ("initial", "base", "ema"),
    "precision": ("float32", "bfloat16"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """How `GRPOTrainer` trains.

    How many rollouts a group has is the rollout source's affair (`group_size=` of `client.rollouts`).

    Raises:
        ConfigurationError: a value is out of range, or two fields exclude each other; the message names the
            field and the way out.
    """

    loss: LossConfig = field(default_factory=LossConfig)
    """Which loss; the default is DAPO's without a reference policy."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, learning rate and its schedule, gradient clipping."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """From when on a step's numbers are worth a warning that names the likely cause."""

    tasks_per_step: int = 32
    """Tasks whose groups make one step; all tasks if there are fewer. The rest of an epoch that does not
    fill a step is left out; each epoch is shuffled anew, so it is another rest each time."""
    minibatches: int = 2
    """Updates in one pass over a step's rows. The split is by rollout groups, shuffled with `seed`, so that
    each update sees advantages that are centred; there are never more updates than groups."""
    epochs: int = 1
    """Passes over a step's rows."""
    max_steps: int | None = None
    """The iteration ends after this many steps, those before a resume included. None: never."""
    max_staleness: int = 0
    """How many steps the weights may be ahead of those that sampled a token. 0: rollouts and training take
    turns, and the same seed gives the same run. Above: rollouts for the next steps are made during the
    training and go on through weight updates, each token under the version that sampled it; a loss for
    stale data is advisable (`LossConfig.decoupled()`). Older tokens carry no loss and are counted."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What `group_advantages` subtracts."""
    scale: Literal["std", "none", "batch"] = "std"
    """What `group_advantages` divides by."""
    min_valid_per_group: int = 2
    """Groups with fewer rollouts that have a reward are dropped and counted."""
    drop_zero_variance: bool = True
    """Whether groups whose rewards are all equal are dropped and counted. If kept, they add nothing to the
    gradient of the surrogate, but their tokens count in the loss's normaliser."""
    overlong: Literal["keep", "mask"] = "keep"
    """`mask`: rollouts that were cut off stay in the baseline but carry no loss (overlong filtering; DAPO,
    arXiv 2503.14476, section 3.4). The soft penalty of that section is a verifier: `verifiers.overlong`."""
    max_row_tokens: int | None = None
    """Rows longer than this are left out of the loss and counted. None: each row is trained, however long."""
    temperature: float = 1.0
    """The temperature that the rollouts were sampled at; log-probs are taken at it."""
    check_on_policy: bool = True
    """Whether to compare the log-probs of all trained rows before the first update with the engine's
    (`max_logprob_diff`, `token_mult_prob_error`, `gen_kl`). Costs a forward pass over the rows that are not
    in the first minibatch."""

    reference: Literal["initial", "base", "ema"] = "initial"
    """The policy that `loss.kl_coefficient` holds on to: a copy of what is trained, as it was at the start;
    for LoRA also the model under the adapter, which costs no memory; or a moving average of what is trained.
    Made only if the coefficient is not 0."""
    reference_decay: float = 0.999
    """Of the moving average: after each update, average = decay * average + (1 - decay) * weights."""
    reference_refresh_updates: int | None = None
    """After so many updates each, an `initial` reference becomes the trained policy. None: never."""

    max_tokens_per_microbatch: int = 8192
    """Most tokens of one forward and backward pass, shared prefixes counted once. It bounds memory and does
    not change the result."""
    pack: bool = True
    """Whether micro-batches are one stream of tokens in which a prefix that rows share is computed once; with
    False they are padded rows, which every architecture can do."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: matrix products under autocast; log-probs, loss and weights stay in float32."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass instead of kept: less memory, a third more
    work."""
    fused_kernels: bool = False
    """Whether Liger's kernels replace the model's norms, rotary embeddings and MLPs; on CUDA devices."""
    seed: int = 0
    """Seeds the order of tasks and the split into minibatches."""
    sync_timeout_s: float = 300.0
    """Deadline of one weight sync, in seconds."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        for name in ("temperature", "sync_timeout_s"):
            self._require(name, 0.0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("minibatches", "epochs", "tasks_per_step", "max_tokens_per_microbatch"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_row_tokens", "reference_refresh_updates"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or None for off")
        self._require("min_valid_per_group", self.min_valid_per_group >= 2, "at least 2")
        self._require("max_steps", self.max_steps is None or self.max_steps >= 0, "0 or more, or None")
        self._require("max_staleness", self.max_staleness >= 0, "0 or more")
        self._require("reference_decay", 0.0 < self.reference_decay < 1.0, "in (0, 1)")
        self._check_reference()

    def _check_reference(self) -> None:
        refresh = self.reference_refresh_updates
        rule = f"None with reference={self.reference!r}; set reference='initial'"
        self._require("reference_refresh_updates", refresh is None or self.reference == "initial", rule)
        if self.loss.needs_reference:
            return
        rule = "the default while loss.kl_coefficient is 0: nothing reads a reference policy"
        self._require("reference", self.reference == "initial", rule)
        self._require("reference_refresh_updates", self.reference_refresh_updates is None, rule)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigurationError(f"GRPOConfig.{name} must be {rule}, not {getattr(self, name)!r}")
