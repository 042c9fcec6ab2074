"""What `LossConfig` refuses, what its presets are, and what it says that the loss needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from grpo.losses.naive import DEFAULT_BOUNDS

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.losses import LossConfig

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ratio": "row"}, "LossConfig.ratio must be one of 'token', 'sequence', not 'row'"),
    ({"surrogate": "ppo"}, "LossConfig.surrogate must be one of"),
    ({"aggregation": "mean"}, "LossConfig.aggregation must be one of"),
    ({"anchor": "old"}, "LossConfig.anchor must be one of"),
    ({"correction": "tis"}, "LossConfig.correction must be one of"),
    ({"kl_estimator": "k4"}, "LossConfig.kl_estimator must be one of"),
    ({"clip_low": 0.0}, r"LossConfig.clip_low must be in \(0, 1\], not 0.0"),
    ({"clip_low": 1.1}, "LossConfig.clip_low"),
    ({"clip_high": 0.0}, "LossConfig.clip_high"),
    ({"clip_high": math.inf}, "LossConfig.clip_high"),
    ({"kl_coefficient": -0.1}, "LossConfig.kl_coefficient"),
    ({"entropy_coefficient": math.nan}, "LossConfig.entropy_coefficient"),
    ({"dual_clip": 1.0}, "LossConfig.dual_clip must be above 1"),
    ({"dual_clip": 3.0, "surrogate": "cispo"}, 'must be None with surrogate="cispo"'),
    ({"aggregation": "constant"}, 'constant_tokens must be at least 1 with aggregation="constant"'),
    ({"aggregation": "constant", "constant_tokens": 0}, "LossConfig.constant_tokens"),
    ({"constant_tokens": 8}, 'must be None with aggregation="token"; "constant" uses it, not 8'),
    ({"correction_high": 2.0}, 'must be None with correction="none"'),
    ({"correction_low": 0.5}, 'must be None with correction="none"'),
    ({"correction": "icepop", "anchor": "proximal", "correction_low": 1.5}, "LossConfig.correction_low"),
    ({"correction": "icepop", "anchor": "proximal", "correction_high": 0.5}, "LossConfig.correction_high"),
    ({"correction": "token_tis"}, 'with anchor="behaviour".*or set anchor="proximal", not \'token_tis\''),
    ({"correction": "sequence_tis"}, 'set anchor="proximal"'),
    ({"correction": "icepop"}, 'set anchor="proximal"'),
    ({"correction": "sequence_mis"}, 'set anchor="proximal"'),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_values_and_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LossConfig(**options)


@pytest.mark.parametrize("correction", DEFAULT_BOUNDS)
def test_a_bound_that_is_not_given_is_the_default(correction: str) -> None:
    low, high = DEFAULT_BOUNDS[correction]
    make = {"anchor": "proximal", "correction": correction}
    assert LossConfig(**make).correction_bounds == (low, high)
    assert LossConfig(**make, correction_high=math.inf).correction_bounds == (low, math.inf)
    assert LossConfig(**make, correction_low=0.0).correction_bounds == (0.0, high)


def test_needs_follow_what_the_loss_reads() -> None:
    plain = LossConfig()
    assert not plain.needs_proximal
    assert not plain.needs_reference
    assert not plain.needs_entropy_gradient
    assert LossConfig(anchor="proximal").needs_proximal
    assert LossConfig(correction="geometric_mask").needs_proximal
    assert LossConfig(kl_coefficient=0.01).needs_reference
    assert LossConfig(entropy_coefficient=0.01).needs_entropy_gradient


def test_presets_take_overrides_and_check_them() -> None:
    assert LossConfig.grpo(kl_coefficient=0.0).needs_reference is False
    assert LossConfig.decoupled(correction_high=math.inf).correction_bounds == (0.0, math.inf)
    with pytest.raises(ConfigurationError, match='set anchor="proximal"'):
        LossConfig.decoupled(anchor="behaviour")
    with pytest.raises(TypeError, match="cap"):
        LossConfig.cispo(cap=3)
