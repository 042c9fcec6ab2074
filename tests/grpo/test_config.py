"""Settings: refused when they are out of range, and what they mean."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo import GRPOConfig


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"adam_epsilon": -1.0},
        {"adam_betas": (0.9, 1.0)},
        {"max_grad_norm": math.inf},
        {"temperature": 0.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"clip_low": 0.0},
        {"clip_low": 1.5},
        {"clip_high": 0.0},
        {"tis_cap": 0.0},
        {"minibatches": 0},
        {"epochs": 0},
        {"tasks_per_step": 0},
        {"max_tokens_per_microbatch": 0},
        {"baseline": "median"},
        {"scale": "max"},
        {"min_valid_per_group": 1},
        {"max_steps": -1},
        {"sync_timeout_s": 0.0},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigurationError, match=rf"GRPOConfig\.{name} must be"):
        GRPOConfig(**bad)


def test_every_field_is_documented() -> None:
    source = inspect.getsource(GRPOConfig)
    for field in dataclasses.fields(GRPOConfig):
        after = source[source.index(f"    {field.name}: ") :].splitlines()[1]
        assert after.startswith('    """'), field.name


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    config = GRPOConfig(learning_rate=1.0, warmup_steps=4)
    assert [config.learning_rate_at(step) for step in (1, 2, 4, 5, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert GRPOConfig(learning_rate=1.0).learning_rate_at(1) == 1.0
