"""The loss against a reference written in plain Python from the formulas of the papers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo import LossStats, policy_loss

OPTIONS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4},
    {"proximal": True},
    {"proximal": True, "tis_cap": 1.3},
    {"proximal": True, "tis_cap": math.inf},
]


@dataclass
class Inputs:
    log_probs: Tensor
    behaviour: Tensor
    proximal: Tensor
    advantages: Tensor
    mask: Tensor


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(7)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn((5, 9), generator=generator, dtype=torch.float64)

    behaviour = -draw(1.0).abs()
    return Inputs(
        log_probs=behaviour + draw(0.4),
        behaviour=behaviour,
        proximal=behaviour + draw(0.3),
        advantages=draw(1.0),
        mask=torch.rand((5, 9), generator=generator) < 0.6,
    )


def reference(
    inputs: Inputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    proximal: bool = False,
    tis_cap: float | None = None,
) -> tuple[float, list[list[float]], dict[str, float]]:
    """Loss, its derivative by each log-prob, and counts, token by token."""
    total = float(inputs.mask.sum())
    loss, counts = 0.0, {"low": 0.0, "high": 0.0, "kl": 0.0}
    gradient = [[0.0] * inputs.mask.shape[1] for _ in range(inputs.mask.shape[0])]
    for row in range(inputs.mask.shape[0]):
        for column in range(inputs.mask.shape[1]):
            if not inputs.mask[row, column]:
                continue
            new = inputs.log_probs[row, column].item()
            behaviour = inputs.behaviour[row, column].item()
            old = inputs.proximal[row, column].item() if proximal else behaviour
            advantage = inputs.advantages[row, column].item()
            weight = 1.0 if tis_cap is None else min(math.exp(old - behaviour), tis_cap)
            ratio = math.exp(new - old)
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            loss -= weight * min(ratio * advantage, clipped * advantage) / total
            if ratio * advantage <= clipped * advantage:
                gradient[row][column] = -weight * ratio * advantage / total
            else:
                counts["low" if advantage < 0 else "high"] += 1
            counts["kl"] += math.exp(new - behaviour) - 1 - (new - behaviour)
    return loss, gradient, counts


def compute(
    inputs: Inputs, part: slice = slice(None), *, proximal: bool = False, **options: float
) -> tuple[Tensor, LossStats]:
    return policy_loss(
        inputs.log_probs[part],
        inputs.behaviour[part],
        inputs.advantages[part],
        inputs.mask[part],
        normaliser=float(inputs.mask.sum()),
        proximal_log_probs=inputs.proximal[part] if proximal else None,
        **options,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_value_gradient_and_counts_equal_the_reference(inputs: Inputs, options: dict[str, float]) -> None:
    inputs.log_probs.requires_grad_()
    loss, stats = compute(inputs, **options)
    loss.backward()
    expected, gradient, counts = reference(inputs, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-14)
    assert inputs.log_probs.grad is not None
    torch.testing.assert_close(inputs.log_probs.grad, torch.tensor(gradient, dtype=torch.float64))
    assert stats.clipped_low == counts["low"] > 0
    assert stats.clipped_high == counts["high"] > 0
    assert stats.kl == pytest.approx(counts["kl"])
    assert stats.tokens == inputs.mask.sum()


@pytest.mark.parametrize("options", OPTIONS)
def test_micro_batches_add_up_to_the_minibatch(inputs: Inputs, options: dict[str, float]) -> None:
    whole, stats = compute(inputs, **options)
    first, first_stats = compute(inputs, slice(0, 2), **options)
    second, second_stats = compute(inputs, slice(2, 5), **options)
    torch.testing.assert_close(first + second, whole, rtol=0, atol=1e-15)
    total = first_stats + second_stats
    for name in LossStats.__slots__:
        assert getattr(total, name) == pytest.approx(getattr(stats, name), abs=1e-12), name


def test_gradcheck(inputs: Inputs) -> None:
    inputs.log_probs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda log_probs: (
            policy_loss(log_probs, inputs.behaviour, inputs.advantages, inputs.mask, normaliser=3.0).loss
        ),
        (inputs.log_probs,),
    )


def test_what_lies_outside_the_mask_is_ignored(inputs: Inputs) -> None:
    expected, expected_stats = compute(inputs, proximal=True, tis_cap=1.5)
    for tensor in (inputs.log_probs, inputs.behaviour, inputs.proximal, inputs.advantages):
        tensor[~inputs.mask] = math.nan
    inputs.log_probs.requires_grad_()
    loss, stats = compute(inputs, proximal=True, tis_cap=1.5)
    loss.backward()
    assert loss.item() == expected.item()
    assert stats == expected_stats
    assert inputs.log_probs.grad is not None
    assert inputs.log_probs.grad.isfinite().all()


def test_without_proximal_the_behaviour_policy_is_the_old_one(inputs: Inputs) -> None:
    inputs.proximal = inputs.behaviour
    assert compute(inputs)[0] == compute(inputs, proximal=True, tis_cap=2.0)[0]


def test_an_absurd_ratio_stays_finite() -> None:
    log_probs = torch.tensor([[0.0, 0.0]], requires_grad=True)
    loss, stats = policy_loss(
        log_probs,
        torch.tensor([[-1e4, -1.0]]),
        torch.tensor([[-1.0, 1.0]]),
        torch.tensor([[True, True]]),
        normaliser=2,
    )
    loss.backward()
    assert loss.isfinite()
    assert stats.ratio_max == pytest.approx(math.exp(20), rel=1e-6)
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_tis_counts_capped_tokens() -> None:
    zeros = torch.zeros((1, 3))
    _, stats = policy_loss(
        zeros - 1.0,
        torch.tensor([[-1.0, -3.0, -0.5]]),
        zeros + 1.0,
        zeros == 0,
        normaliser=3,
        proximal_log_probs=zeros - 1.0,
        tis_cap=2.0,
    )
    assert stats.tis_capped == 1
    assert stats.tis_weight == pytest.approx(1.0 + 2.0 + math.exp(-0.5))


def test_bad_combinations_are_refused(inputs: Inputs) -> None:
    with pytest.raises(ConfigurationError, match="needs both"):
        compute(inputs, tis_cap=2.0)
    with pytest.raises(ConfigurationError, match="normaliser must be positive"):
        policy_loss(inputs.log_probs, inputs.behaviour, inputs.advantages, inputs.mask, normaliser=0)
