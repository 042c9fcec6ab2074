from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.transformers.sampling import mix_seed, sample, uniforms

DRAWS = 40_000


def draw(
    logits: torch.Tensor, count: int = DRAWS, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `count` times from one distribution, with the engine's own numbers."""
    numbers = uniforms(np.full(count, mix_seed(7), np.uint64), np.arange(count))
    return sample(
        logits.expand(count, -1),
        torch.from_numpy(numbers),
        temperature=np.full(count, temperature),
        top_k=np.full(count, top_k),
        top_p=np.full(count, top_p),
    )


def frequencies(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=vocab).double() / len(tokens)


def chi_squared(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * len(tokens)
    seen = torch.bincount(tokens, minlength=len(probs)).double()
    return float(((seen - expected) ** 2 / expected)[expected > 0].sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    logits = torch.linspace(-2, 2, 20)
    tokens, _ = draw(logits, temperature=temperature)
    # the 99.99th percentile of chi-squared with 19 degrees of freedom is 50.8
    assert chi_squared(tokens, (logits / temperature).softmax(-1)) < 50.8


def test_log_probs_are_of_the_whole_distribution() -> None:
    logits = torch.linspace(-2, 2, 20)
    tokens, log_probs = draw(logits, 1000, temperature=0.7, top_k=3, top_p=0.9)
    expected = (logits / 0.7).log_softmax(-1)[tokens]
    assert torch.allclose(log_probs, expected, atol=1e-6)


def test_top_k_keeps_the_likeliest_and_their_proportions() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    tokens, _ = draw(logits, top_k=2)
    kept = torch.tensor([0.0, math.e**3, 0.0, math.e**2, 0.0])
    assert set(tokens.tolist()) == {1, 3}
    assert torch.allclose(frequencies(tokens, 5), (kept / kept.sum()).double(), atol=0.01)


@pytest.mark.parametrize(
    ("top_p", "support"), [(0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.85, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, support: set[int]) -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    # an exact boundary would be at the mercy of rounding
    tokens, _ = draw(probs.log().float(), top_p=top_p - 1e-6)
    assert set(tokens.tolist()) == support


def test_top_p_applies_to_what_top_k_leaves() -> None:
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # of the first two, renormalised, the likelier holds 0.57
    tokens, _ = draw(probs.log(), top_k=2, top_p=0.55)
    assert set(tokens.tolist()) == {0}


def test_greedy_reports_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    tokens, log_probs = sample(
        logits,
        torch.zeros(1, dtype=torch.float64),
        temperature=np.zeros(1),
        top_k=np.zeros(1, np.int64),
        top_p=np.ones(1),
    )
    assert tokens.tolist() == [1]
    assert torch.allclose(log_probs, logits.log_softmax(-1)[:, 1])


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    tokens, log_probs = draw(torch.tensor([5.0, -80.0, 4.0]), 100, temperature=1e-40)
    assert set(tokens.tolist()) == {0}
    assert log_probs.eq(0).all()


def test_an_impossible_token_is_never_sampled() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    tokens, log_probs = draw(logits)
    assert set(tokens.tolist()) == {1, 3}
    assert log_probs.isfinite().all()
    edge, _ = sample(
        logits.expand(2, -1),
        torch.tensor([0.0, 1 - 2.0**-48], dtype=torch.float64),
        temperature=np.ones(2),
        top_k=np.zeros(2, np.int64),
        top_p=np.ones(2),
    )
    assert edge.tolist() == [1, 3]


def test_rows_with_different_settings_do_not_disturb_each_other() -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    numbers = torch.from_numpy(uniforms(np.arange(6, dtype=np.uint64), np.arange(6)))
    temperature = np.array([1.0, 0.0, 0.7, 1.0, 2.0, 1.0])
    top_k = np.array([0, 0, 5, 1, 0, 30])
    top_p = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    together = sample(logits, numbers, temperature=temperature, top_k=top_k, top_p=top_p)
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample(
            logits[one], numbers[one], temperature=temperature[one], top_k=top_k[one], top_p=top_p[one]
        )
        assert together[0][one].tolist() == alone[0].tolist()
        assert torch.allclose(together[1][one], alone[1], atol=1e-6)


def test_uniforms_are_uniform_and_unrelated() -> None:
    keys = np.array([mix_seed(seed) for seed in range(200)], np.uint64)
    table = np.stack([uniforms(keys, np.full(200, count)) for count in range(200)])
    assert table.min() >= 0
    assert table.max() < 1
    counts = np.histogram(table, 50, (0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 97  # 99.99th percentile, 49 degrees of freedom
    # neighbours in position and in seed are uncorrelated: five standard errors of 40,000 pairs
    assert abs(np.corrcoef(table[1:].ravel(), table[:-1].ravel())[0, 1]) < 0.025
    assert abs(np.corrcoef(table[:, 1:].ravel(), table[:, :-1].ravel())[0, 1]) < 0.025


@given(st.integers(-(2**70), 2**70))
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= mix_seed(seed) < 2**64


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1 - 2.0**-40),
)
def test_what_is_sampled_is_among_the_likeliest_k(
    values: list[float], top_k: int, top_p: float, number: float
) -> None:
    logits = torch.tensor([values])
    tokens, _ = sample(
        logits,
        torch.tensor([number], dtype=torch.float64),
        temperature=np.ones(1),
        top_k=np.array([top_k]),
        top_p=np.array([top_p]),
    )
    better = int((logits[0] > logits[0, tokens[0]]).sum())
    assert better < (top_k or len(values))
    mass = float(logits[0].double().softmax(-1)[logits[0] > logits[0, tokens[0]]].sum())
    assert mass <= top_p + 1e-6 or top_k
