"""`policy_loss` against `naive_loss`: values, gradients and counts, for every variant and for random ones."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from grpo.losses.batches import Minibatch, compute, compute_naive, draw_minibatch, gradients, table
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.losses import LossConfig, LossStats, loss_normaliser, policy_loss

GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"}
PROXIMAL = {"anchor": "proximal"}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "narrow": {"clip_low": 0.1, "clip_high": 0.05},
    "dual clip": {"dual_clip": 1.5},
    "sequence mean": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant", "constant_tokens": 7},
    "sequence ratio": GSPO,
    "sequence ratio, token mean": GSPO | {"aggregation": "token", "dual_clip": 1.1},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.4},
    "cispo with a lower bound": {"surrogate": "cispo", "clip_low": 0.1},
    "cispo, sequence ratio": {"surrogate": "cispo", "ratio": "sequence", "clip_low": 0.01, "clip_high": 0.01},
    "proximal": PROXIMAL,
    "token_tis": PROXIMAL | {"correction": "token_tis", "correction_high": 1.3},
    "token_tis with a floor": PROXIMAL | {"correction": "token_tis", "correction_low": 0.8},
    "untruncated": PROXIMAL | {"correction": "token_tis", "correction_high": math.inf},
    "sequence_tis": PROXIMAL | {"correction": "sequence_tis", "correction_high": 1.5},
    "icepop": PROXIMAL | {"correction": "icepop", "correction_low": 0.8, "correction_high": 1.25},
    "sequence_mis": PROXIMAL | {"correction": "sequence_mis", "correction_high": 1.5},
    "sequence_mask": PROXIMAL | {"correction": "sequence_mask"},
    "sequence_mask, behaviour": {"correction": "sequence_mask"},
    "geometric_mask": {"correction": "geometric_mask", "correction_low": 0.9, "correction_high": 1.1},
    "k1": {"kl_coefficient": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coefficient": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coefficient": 0.3, "aggregation": "sequence"},
    "entropy": {"entropy_coefficient": 0.2, "aggregation": "sequence"},
    "everything": GSPO
    | PROXIMAL
    | {"correction": "icepop", "kl_coefficient": 0.1, "entropy_coefficient": 0.1, "dual_clip": 2.0},
}

# counts that the variant's minibatch must show, or the comparison would say nothing
SHOWN: dict[str, tuple[str, ...]] = {
    "default": ("clipped_low", "clipped_high"),
    "dual clip": ("dual_clipped",),
    "sequence ratio": ("clipped_low", "clipped_high"),
    "cispo": ("clipped_high",),
    "cispo with a lower bound": ("clipped_low", "clipped_high"),
    "token_tis": ("truncated_tokens",),
    "token_tis with a floor": ("truncated_tokens",),
    "sequence_tis": ("truncated_tokens",),
    "icepop": ("masked_tokens",),
    "sequence_mis": ("masked_tokens", "masked_rows"),
    "sequence_mask": ("masked_tokens", "masked_rows"),
    "sequence_mask, behaviour": ("masked_tokens", "masked_rows"),
    "geometric_mask": ("masked_tokens", "masked_rows"),
}


def assert_equal_to_naive(batch: Minibatch, options: dict[str, Any]) -> LossStats:
    loss, stats = compute(batch, LossConfig(**options))
    expected = compute_naive(batch, options)
    by_log_probs, by_entropy = gradients(batch, loss)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-11, abs=1e-13)
    torch.testing.assert_close(
        by_log_probs, table(expected.gradient, batch.log_probs), rtol=1e-10, atol=1e-13
    )
    torch.testing.assert_close(by_entropy, table(expected.entropy_gradient, batch.entropy))
    assert stats.loss == loss.item()
    assert stats.policy_loss == pytest.approx(expected.policy, rel=1e-11, abs=1e-13)
    assert stats.kl_loss == pytest.approx(expected.divergence, rel=1e-11, abs=1e-13)
    assert stats.entropy_loss == pytest.approx(expected.bonus, rel=1e-11, abs=1e-13)
    assert stats.tokens == batch.mask.sum()
    assert stats.rows == batch.mask.any(-1).sum()
    for name in (
        "clipped_low",
        "clipped_high",
        "dual_clipped",
        "truncated_tokens",
        "masked_tokens",
        "masked_rows",
        "correction_weight",
        "behaviour_kl",
        "reference_kl",
        "ratio",
    ):
        assert getattr(stats, name) == pytest.approx(expected.counts[name], rel=1e-10), name
    assert stats.entropy == pytest.approx(batch.entropy[batch.mask].sum().item())
    return stats


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_the_naive_loss(name: str) -> None:
    batch = draw_minibatch(5, rows=12)
    stats = assert_equal_to_naive(batch, VARIANTS[name])
    for count in SHOWN.get(name, ()):
        assert 0 < getattr(stats, count) < stats.tokens, count


PRESETS: list[tuple[LossConfig, dict[str, Any]]] = [
    (LossConfig.grpo(), {"clip_high": 0.2, "aggregation": "sequence", "kl_coefficient": 0.04}),
    (LossConfig.dapo(), {}),
    (LossConfig.dr_grpo(64), {"clip_high": 0.2, "aggregation": "constant", "constant_tokens": 64}),
    (LossConfig.gspo(), GSPO),
    (LossConfig.cispo(), {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0}),
    (LossConfig.decoupled(), PROXIMAL | {"clip_high": 0.2, "correction": "token_tis"}),
    (
        LossConfig.decoupled(correction_high=math.inf),
        PROXIMAL | {"clip_high": 0.2, "correction": "token_tis", "correction_high": math.inf},
    ),
]


@pytest.mark.parametrize(("config", "options"), PRESETS)
def test_presets_equal_the_naive_loss(config: LossConfig, options: dict[str, Any]) -> None:
    """The published settings, written out."""
    assert config == LossConfig(**options)
    assert_equal_to_naive(draw_minibatch(7, rows=12), options)


@st.composite
def any_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination that `LossConfig` accepts."""
    options: dict[str, Any] = {
        "ratio": draw(st.sampled_from(["token", "sequence"])),
        "surrogate": draw(st.sampled_from(["clip", "cispo"])),
        "clip_low": draw(st.sampled_from([1e-3, 0.2, 1.0])),
        "clip_high": draw(st.sampled_from([1e-3, 0.28, 4.0])),
        "aggregation": draw(st.sampled_from(["token", "sequence", "constant"])),
        "anchor": draw(st.sampled_from(["behaviour", "proximal"])),
        "kl_coefficient": draw(st.sampled_from([0.0, 0.1])),
        "kl_estimator": draw(st.sampled_from(["k1", "k2", "k3"])),
        "entropy_coefficient": draw(st.sampled_from([0.0, 0.1])),
    }
    corrections = ["none", "sequence_mask", "geometric_mask"]
    if options["anchor"] == "proximal":
        corrections += ["token_tis", "sequence_tis", "icepop", "sequence_mis"]
    options["correction"] = draw(st.sampled_from(corrections))
    if options["correction"] != "none":
        options["correction_low"] = draw(st.sampled_from([None, 0.0, 0.9]))
        options["correction_high"] = draw(st.sampled_from([None, 1.2, math.inf]))
    if options["surrogate"] == "clip":
        options["dual_clip"] = draw(st.sampled_from([None, 1.05, 3.0]))
    if options["aggregation"] == "constant":
        options["constant_tokens"] = 11
    return options


@settings(max_examples=60, deadline=None)
@given(any_settings(), st.integers(0, 10**6), st.sampled_from([0.01, 0.5, 30.0]))
def test_any_accepted_config_equals_the_naive_loss(options: dict[str, Any], seed: int, drift: float) -> None:
    assert_equal_to_naive(draw_minibatch(seed, drift=drift, mismatch=drift / 2), options)


@settings(max_examples=30, deadline=None)
@given(any_settings(), st.integers(0, 10**6), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_micro_batches_add_up_to_the_minibatch(options: dict[str, Any], seed: int, places: list[int]) -> None:
    batch, config = draw_minibatch(seed), LossConfig(**options)
    whole, stats = compute(batch, config)
    normaliser = loss_normaliser(batch.mask.sum(-1).tolist(), config)
    parts = [batch.part([row for row in range(6) if places[row] == place]) for place in set(places)]
    losses = [compute(part, config, normaliser) for part in parts]
    total = sum((part.stats for part in losses), LossStats())
    loss = torch.stack([part.loss for part in losses]).sum()
    for ours, expected in zip(gradients(batch, loss), gradients(batch, whole), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
    for field in fields(LossStats):
        expected = getattr(stats, field.name)
        assert getattr(total, field.name) == pytest.approx(expected, rel=1e-12, abs=1e-12), field.name


@settings(max_examples=30, deadline=None)
@given(any_settings(), st.integers(0, 10**6))
def test_padding_changes_nothing(options: dict[str, Any], seed: int) -> None:
    batch, config = draw_minibatch(seed), LossConfig(**options)
    wide = Minibatch(
        *(
            torch.nn.functional.pad(
                getattr(batch, field.name), (2, 3, 0, 1), value=False if field.name == "mask" else math.inf
            )
            for field in fields(batch)
        )
    )
    loss, stats = compute(wide, config)
    expected, expected_stats = compute(batch, config)
    for ours, other in zip(gradients(batch, loss), gradients(batch, expected), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-15)
    for field in fields(LossStats):
        other = getattr(expected_stats, field.name)
        assert getattr(stats, field.name) == pytest.approx(other, rel=1e-12, abs=1e-12), field.name


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_absurd_tokens_stay_finite(ratio: str, surrogate: str) -> None:
    """Ten thousand nats of difference, or infinitely many, give large numbers, not infinite ones."""
    log_probs = torch.tensor([[0.0, -1e4, -1.0, -1.0]], requires_grad=True)
    loss, stats = policy_loss(
        log_probs,
        torch.tensor([[-1e4, 0.0, -math.inf, -1.0]]),
        torch.tensor([[-1.0, 1.0, -1.0, 1.0]]),
        torch.ones((1, 4), dtype=torch.bool),
        normaliser=4,
        config=LossConfig(ratio=ratio, surrogate=surrogate, correction="sequence_mask", kl_coefficient=1.0),
        proximal_log_probs=torch.zeros((1, 4)),
        reference_log_probs=torch.full((1, 4), -1e4),
    )
    loss.backward()
    assert all(math.isfinite(getattr(stats, field.name)) for field in fields(stats))
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    if surrogate == "clip" and ratio == "token":
        assert stats.ratio_max == pytest.approx(math.exp(20), rel=1e-6)


NEEDED = PROXIMAL | {"kl_coefficient": 0.1, "entropy_coefficient": 0.1}


@pytest.mark.parametrize("name", ["log_probs", "behaviour", "advantages", "proximal", "reference", "entropy"])
@pytest.mark.parametrize("correction", ["token_tis", "sequence_mask", "geometric_mask"])
def test_nan_inside_the_mask_shows_in_the_loss(name: str, correction: str) -> None:
    """No mask of a correction may hide it: the trainer looks at the loss alone."""
    batch = draw_minibatch(1)
    with torch.no_grad():
        getattr(batch, name)[0][batch.mask[0]] = math.nan
    assert math.isnan(compute(batch, LossConfig(**NEEDED, correction=correction)).stats.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    batch = draw_minibatch(2)
    half = Minibatch(
        *(value if value.dtype == torch.bool else value.detach().to(dtype) for value in vars(batch).values())
    )
    upcast = Minibatch(
        *(value if value.dtype == torch.bool else value.float() for value in vars(half).values())
    )
    config = LossConfig(**NEEDED, correction="token_tis")
    assert compute(half, config).stats == compute(upcast, config).stats


def test_an_entropy_that_is_only_counted_costs_no_backward_pass() -> None:
    """Nor can it spoil the loss."""
    batch = draw_minibatch()
    with torch.no_grad():
        batch.entropy.fill_(math.nan)
    loss, stats = compute(batch, LossConfig())
    assert math.isnan(stats.entropy)
    assert math.isfinite(stats.loss)
    assert torch.autograd.grad(loss, batch.entropy, allow_unused=True) == (None,)


def test_an_unread_tensor_may_be_missing() -> None:
    batch = draw_minibatch()
    given_all = compute(batch, LossConfig())
    bare = policy_loss(batch.log_probs, batch.behaviour, batch.advantages, batch.mask, normaliser=26)
    assert bare.stats.entropy == 0.0
    assert given_all.stats.entropy > 0.0
    assert bare.loss.item() == pytest.approx(given_all.loss.item() * given_all.stats.tokens / 26)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"anchor": "proximal"}, "proximal_log_probs"),
        ({"correction": "sequence_mask"}, "proximal_log_probs"),
        ({"kl_coefficient": 0.1}, "reference_log_probs"),
        ({"entropy_coefficient": 0.1}, "entropy"),
    ],
)
def test_a_tensor_that_the_config_needs_is_asked_for(options: dict[str, Any], missing: str) -> None:
    batch = draw_minibatch()
    with pytest.raises(ConfigurationError, match=f"needs {missing}"):
        policy_loss(
            batch.log_probs,
            batch.behaviour,
            batch.advantages,
            batch.mask,
            normaliser=1.0,
            config=LossConfig(**options),
        )


def test_wrong_normalisers_and_shapes_are_refused() -> None:
    batch = draw_minibatch()
    for normaliser in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="normaliser must be positive"):
            compute(batch, LossConfig(), normaliser)
    batch.mask = batch.mask.long()
    with pytest.raises(ConfigurationError, match=r"loss_mask is torch.int64; pass loss_mask.bool\(\)"):
        compute(batch, LossConfig())
    batch.mask = batch.mask.bool()
    batch.advantages = batch.advantages[:, :1]
    with pytest.raises(ConfigurationError, match=r"advantages has shape \(6, 1\) and loss_mask \(6, 9\)"):
        compute(batch, LossConfig())


def test_rows_without_loss_count_in_no_normaliser() -> None:
    config = {"aggregation": "constant", "constant_tokens": 5}
    assert loss_normaliser([3, 0, 4], LossConfig()) == 7
    assert loss_normaliser([3, 0, 4], LossConfig(aggregation="sequence")) == 2
    assert loss_normaliser([3, 0, 4], LossConfig(**config)) == 10
    with pytest.raises(ConfigurationError, match="none of the 2 rows has a token with loss; skip"):
        loss_normaliser([0, 0], LossConfig())
