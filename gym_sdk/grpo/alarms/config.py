"""From when on a number is an alarm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gym_sdk.errors import ConfigurationError

__all__ = ["AlarmConfig"]

_POSITIVE = ("max_mismatch", "max_length_ratio", "min_length_ratio", "max_grad_norm_ratio", "max_approx_kl")
_SHARES = (
    "max_flat_share",
    "max_dropped_share",
    "max_failed_share",
    "max_unparsed_share",
    "max_truncated_share",
    "max_clip_fraction",
)
_AT_LEAST_0 = ("min_entropy", "max_forks", "max_unreported_forks", "max_staleness")
_COUNTS = ("patience", "window", "least_history", "quiet_steps", "repeat_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmConfig:
    """Thresholds of the alarms; None (or False) switches one off.

    Raises:
        ConfigurationError: a value is out of range; the message names the field.
    """

    not_finite: bool = True
    """Whether a metric that is NaN or infinite is an alarm."""
    max_mismatch: float | None = 1.05
    """Most `token_mult_prob_error`; NeMo RL's rule of thumb."""
    max_approx_kl: float | None = 0.1
    """Most `approx_kl`, in nats per token. Updates on fresh rollouts usually stay below 0.02."""
    max_clip_fraction: float | None = 0.3
    """Most `clip_low_fraction` and `clip_high_fraction` together. With ratios of tokens it usually stays
    below 0.05; those of sequences (GSPO) clip more."""
    max_grad_norm_ratio: float | None = 10.0
    """Most `grad_norm_max`, as a multiple of its running median."""
    min_entropy: float | None = 0.02
    """Least `entropy`, in nats per token."""
    max_flat_share: float | None = 0.9
    """From this `groups_flat_share` on, groups have nothing to teach (for `patience` steps)."""
    max_dropped_share: float | None = 0.25
    """Most groups that are dropped for another reason than equal rewards, as a share (for `patience`
    steps)."""
    max_failed_share: float | None = 0.1
    """Most `failed_share`."""
    no_tool_calls: bool = True
    """Whether it is an alarm if tools are on offer and none is called (for `patience` steps)."""
    max_unparsed_share: float | None = 0.5
    """Most pieces of tool-call markup that did not parse, as a share of all calls and such pieces (for
    `patience` steps)."""
    max_length_ratio: float | None = 2.0
    """Most `generated_tokens_mean`, as a multiple of its running median."""
    min_length_ratio: float | None = 1 / 3
    """Least `generated_tokens_mean`, as a multiple of its running median."""
    max_truncated_share: float | None = 0.5
    """Most `truncated_share` (for `patience` steps)."""
    max_forks: float | None = 0.5
    """Most `forks` per rollout. An agent that edits its history forks on purpose: allow it here."""
    max_unreported_forks: float | None = 0.0
    """Most `unreported_forks` per rollout."""
    max_staleness: int | None = None
    """Most `staleness_max`, in versions: the bound that the rollouts are meant to keep."""
    patience: int = 3
    """Steps in a row for which a share has to be out of bounds, where chance alone can do that once."""
    window: int = 50
    """Steps that a running median looks back on."""
    least_history: int = 5
    """Steps before a running median is believed."""
    quiet_steps: int = 3
    """An alarm is over when its cause has been absent for so many steps in a row; then it can begin again."""
    repeat_every: int = 100
    """Steps after which an alarm that is not over is raised again."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            self._require(name, 0.0, math.inf, "positive and finite, or None for off", least_is_allowed=False)
        for name in _SHARES:
            self._require(name, 0.0, 1.0, "in [0, 1], or None for off")
        for name in _AT_LEAST_0:
            self._require(name, 0.0, math.inf, "0 or positive, or None for off")
        for name in _COUNTS:
            self._require(name, 1, math.inf, "at least 1")
        self._require("least_history", 1, self.window, f"at most window ({self.window})")

    def _require(
        self, name: str, least: float, most: float, rule: str, *, least_is_allowed: bool = True
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not least <= value <= most or value == math.inf or (value == least and not least_is_allowed):
            raise ConfigurationError(f"AlarmConfig.{name} must be {rule}, not {value!r}")
