"""The optimiser's settings, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from gym_sdk.errors import ConfigurationError

__all__ = ["OptimizerConfig", "OptimizerName", "Schedule"]

OptimizerName = Literal["adamw", "adafactor", "sgd", "muon"]
Schedule = Literal["constant", "linear", "cosine"]
_BETAS = (0.9, 0.95)
_EPSILON = 1e-8
_MUON_MOMENTUM = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Which optimiser updates the weights, and how fast.

    Raises:
        ConfigurationError: a value is out of range, or contradicts another; the message names the field.
    """

    name: OptimizerName = "adamw"
    """Torch's own implementations.

    - `adamw`: Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2). Two moments, 8 bytes for each
      trained parameter.
    - `adafactor`: factored second moment (arXiv 1804.04235, algorithm 4), hardly any state. Its learning rate
      is relative: an update is scaled by its tensor's root mean square, or 1e-3 if that is more.
    - `sgd`: plain, or with `momentum`.
    - `muon`: orthogonalised momentum for the matrices of the hidden layers, with updates scaled to AdamW's
      size, so that one learning rate serves all (arXiv 2502.16982, section 2.2); AdamW for everything else:
      embeddings, vocabulary projection, norm weights, biases, and tensors of more than two dimensions. Each
      update takes 5 iterations of matrix products in bfloat16, which are slow on CPUs."""
    learning_rate: float = 1e-6
    """Peak of the schedule. The default suits full fine-tuning of models of 1 B parameters and more; adapters
    (LoRA) take about 10 times as much, and a tiny policy (about 1 M) learns at 5e-4."""
    betas: tuple[float, float] = _BETAS
    """AdamW's decay rates of the first and the second moment, in Muon's AdamW part too."""
    epsilon: float = _EPSILON
    """AdamW's divisor guard, in Muon's AdamW part too."""
    weight_decay: float = 0.0
    """Applied to tensors of two dimensions and more, never to biases and norm weights. Decoupled from the
    gradient, except with `sgd`, where it is added to the gradient before the momentum."""
    momentum: float | None = None
    """Decay rate of the momentum of `sgd` and `muon`. None: 0 for `sgd`, 0.95 for `muon`."""
    max_grad_norm: float = 1.0
    """The gradient of each update is scaled down to this global norm; `math.inf` leaves it as it is."""
    schedule: Schedule = "constant"
    """How the learning rate goes on after the warm-up: it stays, falls along a line, or along half a cosine
    (arXiv 1608.03983, equation 5, without restarts)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly; step s of them (from 1) runs at s / warmup_steps."""
    decay_steps: int | None = None
    """Steps from the end of the warm-up to the schedule's lowest rate, which then stays. For `linear` and
    `cosine`, and needed there."""
    final_ratio: float = 0.0
    """The lowest rate of `linear` and `cosine`, as a part of `learning_rate`."""

    def __post_init__(self) -> None:
        for name, choices in (("name", get_args(OptimizerName)), ("schedule", get_args(Schedule))):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        for name in ("learning_rate", "epsilon"):
            self._require(name, 0.0 < getattr(self, name) < math.inf, "positive and finite")
        self._require("max_grad_norm", self.max_grad_norm > 0.0, "positive")
        self._require("weight_decay", 0.0 <= self.weight_decay < math.inf, "0 or positive, and finite")
        self._require(
            "betas", len(self.betas) == 2 and all(0.0 <= b < 1.0 for b in self.betas), "two in [0, 1)"
        )
        self._require("momentum", self.momentum is None or 0.0 <= self.momentum < 1.0, "in [0, 1), or None")
        self._require("warmup_steps", self.warmup_steps >= 0, "0 or more")
        self._require("decay_steps", self.decay_steps is None or self.decay_steps >= 1, "at least 1, or None")
        self._require("final_ratio", 0.0 <= self.final_ratio <= 1.0, "in [0, 1]")
        self._refuse_contradictions()

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigurationError(f"OptimizerConfig.{name} must be {rule}, not {getattr(self, name)!r}")

    def _refuse_contradictions(self) -> None:
        """Refuse settings that would have no effect, or lack what they need."""
        if self.schedule == "constant":
            if self.decay_steps is not None or self.final_ratio != 0.0:
                raise ConfigurationError(
                    "OptimizerConfig.decay_steps and final_ratio do nothing with schedule 'constant'; "
                    "leave them out, or choose 'linear' or 'cosine'"
                )
        elif self.decay_steps is None:
            raise ConfigurationError(
                f"OptimizerConfig.decay_steps is needed with schedule {self.schedule!r}: over how many steps "
                "the learning rate falls"
            )
        if self.momentum is not None and self.name in ("adamw", "adafactor"):
            raise ConfigurationError(
                f"OptimizerConfig.momentum does nothing with {self.name!r}; leave it out"
                + (" and set betas[0]" if self.name == "adamw" else ", or choose 'adamw'")
            )
        if self.name in ("adafactor", "sgd") and (self.betas, self.epsilon) != (_BETAS, _EPSILON):
            raise ConfigurationError(
                f"OptimizerConfig.betas and epsilon do nothing with {self.name!r}; leave them out, or choose "
                "'adamw' or 'muon'"
            )

    @property
    def effective_momentum(self) -> float:
        """`momentum`, or what None means for this optimiser."""
        if self.momentum is not None:
            return self.momentum
        return _MUON_MOMENTUM if self.name == "muon" else 0.0

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1.

        It depends on nothing else: a run that resumes at some step needs no state of a scheduler.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.decay_steps is None:
            return self.learning_rate
        progress = min((step - self.warmup_steps) / self.decay_steps, 1.0)
        rest = 1.0 - progress if self.schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_ratio + (1.0 - self.final_ratio) * rest)
