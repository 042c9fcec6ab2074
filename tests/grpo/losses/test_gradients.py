"""What the documentation says of gradients, by exact expectation over a small vocabulary or by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gym_sdk.grpo.losses import clipped_surrogate, kl_estimate, sequence_ratio, token_ratio


def expected_gradient(logits: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """The mean of the estimate's gradient over the policy's tokens: each one, by its probability."""
    log_probs = logits.log_softmax(-1)[None]
    estimates = kl_estimate(log_probs, reference[None], estimator=estimator)
    (gradient,) = torch.autograd.grad((log_probs.detach().exp() * estimates).sum(), logits)
    return gradient


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_the_gradient_of_each_kl_estimate_is(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    divergence = {
        "k1": 0.0 * log_probs.sum(),
        "k2": (log_probs.exp() * (log_probs - reference)).sum(),
        "k3": (reference.exp() * (reference - log_probs)).sum(),
    }[estimator]
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(
        expected_gradient(logits, reference, estimator), expected, rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs, reference = torch.randn((2, 1, 5), generator=generator, dtype=torch.float64).log_softmax(-1)
    estimates = kl_estimate(log_probs, reference, estimator=estimator)
    exact = (log_probs.exp() * (log_probs - reference)).sum()
    torch.testing.assert_close((log_probs.exp() * estimates).sum(), exact)


def test_clamped_divergences_are_bounded_and_have_no_gradient() -> None:
    log_probs = torch.tensor([[-50.0, -1.0, -0.5]], requires_grad=True)
    reference = torch.tensor([[-1.0, -50.0, -1.0]])
    values = {name: kl_estimate(log_probs, reference, estimator=name) for name in ("k1", "k2", "k3")}
    assert values["k1"].tolist() == [[-20.0, 20.0, 0.5]]
    assert values["k2"].tolist() == [[200.0, 200.0, 0.125]]
    assert values["k3"][0, :2].tolist() == [10.0, 10.0]
    for value in values.values():
        (gradient,) = torch.autograd.grad(value.sum(), log_probs)
        assert gradient[0, :2].tolist() == [0.0, 0.0]
        assert gradient[0, 2] != 0.0


def test_gspo_token_has_the_gradient_of_gspo() -> None:
    """With one advantage for a row: as if `s = exp(mean(log p - log q))` were differentiated as it stands."""
    generator = torch.Generator().manual_seed(3)
    anchor = -torch.rand((6, 5), generator=generator, dtype=torch.float64)
    log_probs = (
        anchor + 0.2 * torch.randn((6, 5), generator=generator, dtype=torch.float64)
    ).requires_grad_()
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 5])[:, None]
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0, 3.0], dtype=torch.float64)[:, None]
    clips = {"clip_low": 0.05, "clip_high": 0.05}

    tokens = mask.sum(-1, keepdim=True)
    exact = (((log_probs - anchor) * mask).sum(-1, keepdim=True) / tokens).exp()
    expected = clipped_surrogate(exact, advantages, **clips).sum()
    ours = clipped_surrogate(sequence_ratio(log_probs, anchor, mask), advantages.expand(-1, 5), **clips)
    ours = (ours * mask / tokens).sum()

    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, log_probs)[0], torch.autograd.grad(expected, log_probs)[0]
    )


def test_a_ratio_of_equal_policies_is_one() -> None:
    log_probs = torch.tensor([[-0.1, -30.0]], requires_grad=True)
    mask = torch.ones((1, 2), dtype=torch.bool)
    assert token_ratio(log_probs, log_probs.detach()).tolist() == [[1.0, 1.0]]
    assert sequence_ratio(log_probs, log_probs.detach(), mask).tolist() == [[1.0, 1.0]]
