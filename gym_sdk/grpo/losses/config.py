"""What `policy_loss` computes: one frozen object, each field documented, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.losses.aggregation import Aggregation
from gym_sdk.grpo.losses.corrections import DEFAULT_BOUNDS, WEIGHTING, CorrectionName
from gym_sdk.grpo.losses.divergences import KLEstimator

__all__ = ["LossConfig"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "ratio": ("token", "sequence"),
    "surrogate": ("clip", "cispo"),
    "aggregation": get_args(Aggregation),
    "anchor": ("behaviour", "proximal"),
    "correction": get_args(CorrectionName),
    "kl_estimator": get_args(KLEstimator),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Which loss, with which ranges. The default is DAPO's: token ratio, clip-higher, mean over all tokens.

    Raises:
        ConfigurationError: a value is out of range, or two fields exclude each other; the message names the
            field and the way out.
    """

    ratio: Literal["token", "sequence"] = "token"
    """The probability ratio of each token, or the row's length-normalised one with the gradient of GSPO-token
    (arXiv 2507.18071, eq. 14), so that the tokens of a row may have advantages of their own."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), whose clip removes a token's gradient; or CISPO's
    (arXiv 2506.13585, eq. 4), where each log-prob is weighted by the clipped ratio, which is a constant:
    every token keeps a gradient."""
    clip_low: float = 0.2
    """The ratio's lower bound is `1 - clip_low`; at 1 there is none. Sequence ratios move thousands of times
    less than token ratios: see `gspo`."""
    clip_high: float = 0.28
    """The ratio's upper bound is `1 + clip_high`."""
    dual_clip: float | None = None
    """With `surrogate="clip"` and a negative advantage the ratio counts for at most this much, above 1
    (arXiv 1912.09729); 3.0 is usual. None: a token that became likely is pushed down without limit."""
    aggregation: Aggregation = "token"
    """From tokens to one number. "token": mean over all tokens (DAPO, arXiv 2503.14476, eq. 8). "sequence":
    mean over each row's tokens, then over rows (GRPO, arXiv 2402.03300, eq. 3). "constant": sum over tokens
    divided by rows times `constant_tokens` (Dr. GRPO, arXiv 2503.20783)."""
    constant_tokens: int | None = None
    """With `aggregation="constant"`, what each row's sum is divided by: usually the limit of new tokens."""
    anchor: Literal["behaviour", "proximal"] = "behaviour"
    """What the ratio is taken against: the sampler's log-probs, or the trainer's own before the step's
    first update (decoupled objective, arXiv 2110.00641; AReaL, arXiv 2505.24298), which costs
    a forward pass and keeps the clip range where the trainer is when data are stale."""
    correction: CorrectionName = "none"
    """Constant weights from `exp(proximal - behaviour)`, for what the sampler and the trainer disagree on:
    see `correction_weights`. Those that weigh by that ratio need `anchor="proximal"`."""
    correction_low: float | None = None
    """Lower bound of the correction, in [0, 1]; 0 is none. None: the correction's default."""
    correction_high: float | None = None
    """Upper bound of the correction, 1 or more; infinity is none. None: the correction's default: token_tis
    and sequence_tis [0, 2], icepop [0.5, 5], sequence_mis [0, 3], sequence_mask [0.5, 2], geometric_mask
    [0.999, 1.001]."""
    kl_coefficient: float = 0.0
    """Weight of the divergence from the reference policy, aggregated as the surrogate is."""
    kl_estimator: KLEstimator = "k3"
    """Which estimate of that divergence: see `kl_estimate` for what the gradient of each one is."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, aggregated as the surrogate is."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        self._require("clip_low", 0.0 < self.clip_low <= 1.0, "in (0, 1]")
        self._require("clip_high", 0.0 < self.clip_high < math.inf, "positive and finite")
        for name in ("kl_coefficient", "entropy_coefficient"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "0 or positive, and finite")
        self._check_dual_clip()
        self._check_aggregation()
        self._check_correction()

    def _check_dual_clip(self) -> None:
        if self.dual_clip is None:
            return
        self._require("dual_clip", 1.0 < self.dual_clip < math.inf, "above 1 and finite, or None for off")
        self._require(
            "dual_clip",
            self.surrogate == "clip",
            'None with surrogate="cispo", whose weights have a cap already',
        )

    def _check_aggregation(self) -> None:
        tokens = self.constant_tokens
        if self.aggregation == "constant":
            self._require(
                "constant_tokens",
                tokens is not None and tokens >= 1,
                'at least 1 with aggregation="constant": give the limit of new tokens',
            )
        else:
            self._require(
                "constant_tokens",
                tokens is None,
                f'None with aggregation="{self.aggregation}"; "constant" uses it',
            )

    def _check_correction(self) -> None:
        low, high = self.correction_low, self.correction_high
        if self.correction == "none":
            rule = 'None with correction="none": choose a correction that it bounds'
            self._require("correction_low", low is None, rule)
            self._require("correction_high", high is None, rule)
            return
        # both sides hold 1, so that policies that agree are never touched
        self._require(
            "correction_low", low is None or 0.0 <= low <= 1.0, "in [0, 1], or None for the default"
        )
        self._require("correction_high", high is None or high >= 1.0, "1 or more, or None for the default")
        self._require(
            "correction",
            self.correction not in WEIGHTING or self.anchor == "proximal",
            '"none", "sequence_mask" or "geometric_mask" with anchor="behaviour", whose ratio holds the same '
            'weight already; or set anchor="proximal"',
        )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigurationError(f"LossConfig.{name} must be {rule}, not {getattr(self, name)!r}")

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """The correction's lower and upper bound, defaults filled in."""
        low, high = DEFAULT_BOUNDS[self.correction]
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )

    @property
    def needs_proximal(self) -> bool:
        """Whether the loss reads the trainer's log-probs before the step's first update."""
        return self.anchor == "proximal" or self.correction != "none"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads a reference policy's log-probs."""
        return self.kl_coefficient > 0.0

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss is differentiated by the entropy."""
        return self.entropy_coefficient > 0.0

    @classmethod
    def grpo(cls, **overrides: Any) -> LossConfig:
        """GRPO as published (arXiv 2402.03300, section 4): mean over each row, k3 to the reference, 0.04."""
        base = cls(clip_high=0.2, aggregation="sequence", kl_coefficient=0.04)
        return replace(base, **overrides)

    @classmethod
    def dapo(cls, **overrides: Any) -> LossConfig:
        """DAPO (arXiv 2503.14476, eq. 8): clip-higher at 0.28, mean over all tokens, no reference."""
        return replace(cls(clip_low=0.2, clip_high=0.28, aggregation="token"), **overrides)

    @classmethod
    def dr_grpo(cls, constant_tokens: int, **overrides: Any) -> LossConfig:
        """Dr. GRPO (arXiv 2503.20783): a constant normaliser. Its advantages are `scale="none"`."""
        base = cls(clip_high=0.2, aggregation="constant", constant_tokens=constant_tokens)
        return replace(base, **overrides)

    @classmethod
    def gspo(cls, **overrides: Any) -> LossConfig:
        """GSPO (arXiv 2507.18071, section 5.1): sequence ratio, ranges 3e-4 and 4e-4, mean over each row."""
        base = cls(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence")
        return replace(base, **overrides)

    @classmethod
    def cispo(cls, **overrides: Any) -> LossConfig:
        """CISPO (arXiv 2506.13585, eq. 4): no lower bound, weights up to 5 (ScaleRL, arXiv 2510.13786)."""
        return replace(cls(surrogate="cispo", clip_low=1.0, clip_high=4.0), **overrides)

    @classmethod
    def decoupled(cls, **overrides: Any) -> LossConfig:
        """Decoupled PPO (arXiv 2110.00641; AReaL, arXiv 2505.24298) for stale data, weights truncated at 2.

        `correction_high=math.inf` is the papers' objective, whose weights have no bound.
        """
        base = cls(clip_high=0.2, anchor="proximal", correction="token_tis")
        return replace(base, **overrides)
