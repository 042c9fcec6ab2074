"""Corrections of rows that several versions of the weights sampled: what masks judge by, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gym_sdk.grpo.losses import LossConfig, correction_weights, policy_loss
from gym_sdk.grpo.losses.corrections import CorrectionName

# Of each row: proximal - behaviour. Rows differ in where the ratio is off.
DIFFERENCES = [[0.0, 1.2, 0.0], [1.2, 0.0, 0.0], [0.1, 2.5, -0.1], [0.3, 0.3, 0.3]]
ON_POLICY = [[True, False, True], [True, True, True], [True, False, True], [False, False, False]]
LOW, HIGH = 0.5, 2.0


def naive(correction: CorrectionName) -> tuple[list[list[float]], list[list[bool]]]:
    """Weights and masked tokens, from the rules as the docstring states them."""
    weights, masked = [], []
    for row, fresh in zip(DIFFERENCES, ON_POLICY, strict=True):
        judging = [d for d, flag in zip(row, fresh, strict=True) if flag]
        product = math.exp(sum(judging))
        mean = math.exp(sum(judging) / len(judging)) if judging else 1.0
        judged = {"sequence_mis": product, "sequence_mask": product, "geometric_mask": mean}.get(correction)
        whole = math.exp(sum(row))
        line, gone = [], []
        for difference, flag in zip(row, fresh, strict=True):
            ratio = math.exp(difference) if judged is None else judged
            is_out = not LOW <= ratio <= HIGH and (flag or judged is not None)
            weight = {"icepop": math.exp(difference), "sequence_mis": whole}.get(correction, 1.0)
            line.append(0.0 if is_out else min(weight, HIGH))
            gone.append(is_out)
        weights.append(line)
        masked.append(gone)
    return weights, masked


@pytest.mark.parametrize("correction", ["icepop", "sequence_mis", "sequence_mask", "geometric_mask"])
def test_masks_judge_by_tokens_of_the_present_weights(correction: CorrectionName) -> None:
    behaviour = torch.full((4, 3), -2.0, dtype=torch.float64)
    proximal = behaviour + torch.tensor(DIFFERENCES, dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.bool)
    fresh = torch.tensor(ON_POLICY)
    result = correction_weights(
        proximal, behaviour, mask, correction=correction, low=LOW, high=HIGH, on_policy=fresh
    )
    weights, masked = naive(correction)
    torch.testing.assert_close(result.weights, torch.tensor(weights, dtype=torch.float64))
    assert result.masked.tolist() == masked
    unaware = correction_weights(proximal, behaviour, mask, correction=correction, low=LOW, high=HIGH)
    assert not torch.equal(unaware.weights, result.weights)  # it would have masked what is only stale
    everything = torch.ones_like(mask)
    same = correction_weights(
        proximal, behaviour, mask, correction=correction, low=LOW, high=HIGH, on_policy=everything
    )
    assert torch.equal(unaware.weights, same.weights)


def test_the_loss_hands_it_on() -> None:
    config = LossConfig(anchor="proximal", correction="icepop", correction_low=LOW, correction_high=HIGH)
    behaviour = torch.full((4, 3), -2.0)
    proximal = behaviour + torch.tensor(DIFFERENCES)
    mask = torch.ones(4, 3, dtype=torch.bool)

    def loss(on_policy: Tensor | None) -> tuple[float, float]:
        result = policy_loss(
            proximal,
            behaviour,
            torch.ones(4, 3),
            mask,
            normaliser=12.0,
            config=config,
            proximal_log_probs=proximal,
            on_policy=on_policy,
        )
        return float(result.loss), result.stats.masked_tokens

    weights, masked = naive("icepop")
    expected = -sum(sum(row) for row in weights) / 12.0
    assert loss(torch.tensor(ON_POLICY)) == (pytest.approx(expected, rel=1e-6), sum(map(sum, masked)))
    assert loss(None)[1] == 3
