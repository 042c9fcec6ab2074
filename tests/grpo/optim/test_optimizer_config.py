"""The schedule against values worked out by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.optim import OptimizerConfig


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # warm-up over 4 steps, decay over 4 more to a tenth, then flat
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5)]
            + [0.1] * 3,
        ),
    ],
)
def test_the_learning_rate_rises_then_falls(schedule: Any, expected: list[float]) -> None:
    config = OptimizerConfig(
        learning_rate=2.0, schedule=schedule, warmup_steps=4, decay_steps=4, final_ratio=0.1
    )
    rates = [config.learning_rate_at(step) for step in range(1, 11)]
    assert rates == pytest.approx([2.0 * ratio for ratio in expected], rel=1e-14)


def test_without_a_schedule_it_stays() -> None:
    assert {OptimizerConfig(learning_rate=3e-4).learning_rate_at(step) for step in (1, 2, 10**9)} == {3e-4}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2)
    assert [config.learning_rate_at(step) for step in (1, 2, 3)] == [0.5, 1.0, 1.0]


def test_without_a_warmup_the_decay_begins_at_once_and_ends_at_nothing() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", decay_steps=2)
    assert [config.learning_rate_at(step) for step in (1, 2, 3)] == [0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adam"}, "name must be one of 'adamw', 'adafactor', 'sgd', 'muon', not 'adam'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, not 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"epsilon": math.inf}, "epsilon must be positive and finite"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or positive"),
        ({"betas": (0.9, 1.0)}, r"betas must be two in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two"),
        ({"name": "sgd", "momentum": 1.0}, "momentum must be in"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"schedule": "linear", "decay_steps": 0}, "decay_steps must be at least 1"),
        ({"schedule": "linear", "decay_steps": 1, "final_ratio": 1.5}, "final_ratio must be in"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"OptimizerConfig.{message}"):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    ("values", "way_out"),
    [
        ({"decay_steps": 10}, "choose 'linear' or 'cosine'"),
        ({"final_ratio": 0.1}, "choose 'linear' or 'cosine'"),
        ({"schedule": "cosine"}, "decay_steps is needed"),
        ({"momentum": 0.9}, "set betas"),
        ({"name": "adafactor", "momentum": 0.9}, "choose 'adamw'"),
        ({"name": "sgd", "betas": (0.9, 0.999)}, "choose 'adamw' or 'muon'"),
        ({"name": "adafactor", "epsilon": 1e-6}, "choose 'adamw' or 'muon'"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ConfigurationError, match=way_out):
        OptimizerConfig(**values)
