"""Settings: refused when they are out of range, and what they mean."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo import GRPOConfig, LossConfig


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"max_staleness": -1},
        {"max_row_tokens": 0},
        {"overlong": "cut"},
        {"precision": "float16"},
        {"reference": "ema"},
        {"reference_decay": 1.0},
        {"reference_refresh_updates": 10},
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


def test_a_reference_that_is_read_may_be_any() -> None:
    loss = LossConfig(kl_coefficient=0.1)
    assert GRPOConfig(loss=loss, reference="ema").reference == "ema"
    assert GRPOConfig(loss=loss, reference_refresh_updates=10).reference_refresh_updates == 10
    with pytest.raises(ConfigurationError, match="None with reference='ema'"):
        GRPOConfig(loss=loss, reference="ema", reference_refresh_updates=10)
