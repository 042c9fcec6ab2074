"""The updates of one step: exact accumulation, guards, and what stopping leaves behind."""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import GymError
from gym_sdk.grpo import GRPOConfig, Learner, LossConfig, OptimizerConfig
from gym_sdk.grpo.learner import LearningStoppedError
from gym_sdk.grpo.minibatches import minibatches as minibatches_of
from gym_sdk.grpo.versions import WeightHistory
from gym_sdk.tokens import TokenSequence, WeightSpan

Models = Callable[..., PreTrainedModel]
Rows = Callable[..., list[TokenSequence]]
GO = threading.Event()


def groups_of(rows: list[TokenSequence], size: int = 2) -> list[list[TokenSequence]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def gradients(model: PreTrainedModel, rows: list[TokenSequence], **settings: Any) -> list[Tensor]:
    """The gradient of one whole-step update, caught before the optimizer uses it."""
    config = GRPOConfig(minibatches=1, optimizer=OptimizerConfig(max_grad_norm=1e9), **settings)
    learner = Learner(model, config)
    caught: list[Tensor] = []

    def catch(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        caught.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    learner.optimizer.register_step_pre_hook(catch)
    learner.learn(groups_of(rows), step=1, stop=GO)
    return caught


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig.grpo(entropy_coefficient=0.01),
        LossConfig.dr_grpo(16),
        LossConfig.gspo(),
        LossConfig.cispo(),
        LossConfig.decoupled(correction_high=1.1),
        LossConfig(correction="geometric_mask", correction_low=0.9, correction_high=1.1),
    ],
)
def test_gradient_accumulation_and_packing_change_nothing(
    make_model: Models, make_rows: Rows, loss: LossConfig
) -> None:
    """One packed stream, a micro-batch for each row, padded rows, and layers computed again."""
    model = make_model()
    rows = make_rows(model, 9, noise=0.3)
    whole = gradients(copy.deepcopy(model), rows, loss=loss)
    assert any(gradient.norm() > 1e-3 for gradient in whole)
    for settings in (
        {"max_tokens_per_microbatch": 1},
        {"pack": False},
        {"pack": False, "max_tokens_per_microbatch": 30},
        {"gradient_checkpointing": True},
    ):
        parts = gradients(copy.deepcopy(model), rows, loss=loss, **settings)
        for expected, actual in zip(whole, parts, strict=True):
            assert (expected - actual).norm() <= 3e-6 * expected.norm(), settings


def test_a_reference_policy_holds_the_weights_back(make_model: Models, make_rows: Rows) -> None:
    """Its share of the loss is 0 at the start, and grows as the policy leaves it."""
    distances = []
    for coefficient in (0.0, 10.0):
        model = make_model()
        start = weights(model)
        config = GRPOConfig(
            loss=LossConfig(kl_coefficient=coefficient), optimizer=OptimizerConfig(learning_rate=1e-3)
        )
        learner = Learner(model, config)
        rows = groups_of(make_rows(model, 6))
        metrics = [learner.learn(rows, step=step, stop=GO) for step in range(1, 9)]
        distances.append(sum(float((weights(model)[name] - start[name]).norm()) for name in start))
    assert metrics[0]["reference_kl"] < metrics[-1]["reference_kl"]
    assert metrics[-1]["kl_loss"] > 0.0
    assert distances[1] < 0.8 * distances[0]


def test_tokens_of_older_weights_are_no_mismatch(make_model: Models, make_rows: Rows) -> None:
    """Their ratios have numbers of their own, and no mask of the engine's faults removes them."""
    model = make_model()
    rows = make_rows(model, 6)
    for row in rows[:3]:  # sampled two versions ago, by quite another policy
        row.log_probs = [
            value - 1.5 if flag else 0.0 for value, flag in zip(row.log_probs, row.loss_mask, strict=True)
        ]
        row.weight_versions = [WeightSpan("step-000001", row.loss_mask.index(1), len(row))]
    for row in rows[3:]:
        row.weight_versions = [WeightSpan("step-000003", row.loss_mask.index(1), len(row))]
    history = WeightHistory(["step-000000", "step-000001", "step-000002", "step-000003"])
    loss = LossConfig(anchor="proximal", correction="icepop")
    learner = Learner(model, GRPOConfig(loss=loss, minibatches=1))
    metrics = learner.learn(groups_of(rows), step=4, stop=GO, history=history)
    assert metrics["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["stale_ratio_mean"] == pytest.approx(math.exp(1.5), rel=1e-4)
    assert metrics["staleness_max"] == 2
    assert metrics["correction_masked_fraction"] == 0.0
    unaware = Learner(model, GRPOConfig(loss=loss, minibatches=1)).learn(
        groups_of(make_rows(model, 6, noise=3.0)), step=1, stop=GO
    )
    assert unaware["correction_masked_fraction"] > 0.0


def test_the_update_is_the_gradient_of_the_formula(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows = make_rows(model, 6)
    naive = copy.deepcopy(model)
    total = sum(row.trained_tokens for row in rows)
    loss = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row.token_ids)
        table = naive(input_ids=ids[None]).logits[0].log_softmax(-1)
        for position, flag in enumerate(row.loss_mask):
            if flag:
                ratio = (table[position - 1, ids[position]] - row.log_probs[position]).exp()
                assert row.advantage is not None
                loss = loss - ratio * row.advantage / total
    loss.backward()
    trained = list(naive.parameters())
    expected = [p.grad for p in trained if p.ndim >= 2] + [p.grad for p in trained if p.ndim < 2]
    for actual, reference in zip(gradients(model, rows), expected, strict=True):
        assert reference is not None
        assert (actual - reference).norm() <= 1e-5 * reference.norm()


def test_on_policy_rows_agree_and_ratios_are_one(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    learner = Learner(model, GRPOConfig(minibatches=1))
    metrics = learner.learn(groups_of(make_rows(model, 6)), step=1, stop=GO)
    assert metrics["max_logprob_diff"] < 1e-4
    assert metrics["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["gen_kl"] == pytest.approx(0.0, abs=1e-8)
    assert metrics["ratio_min"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0.0
    assert 0.0 < metrics["entropy"] < math.log(model.config.vocab_size)
    assert metrics["updates"] == 1
    assert metrics["correction_weight_mean"] == 1.0


def test_a_mismatch_with_the_engine_shows(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows = make_rows(model, 4)
    sampled = [-0.3 if flag else 0.0 for flag in rows[0].loss_mask]
    rows[0].log_probs = [p + shift for p, shift in zip(rows[0].log_probs, sampled, strict=True)]
    metrics = Learner(model, GRPOConfig()).learn(groups_of(rows), step=1, stop=GO)
    share = rows[0].trained_tokens / sum(row.trained_tokens for row in rows)
    assert metrics["max_logprob_diff"] == pytest.approx(0.3, abs=1e-5)
    assert metrics["token_mult_prob_error"] == pytest.approx(1 + share * (math.exp(0.3) - 1), abs=1e-5)
    assert metrics["gen_kl"] == pytest.approx(share * (math.exp(0.3) - 1.3), abs=1e-5)


def test_the_check_can_be_turned_off(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    metrics = Learner(model, GRPOConfig(check_on_policy=False)).learn(
        groups_of(make_rows(model, 4)), step=1, stop=GO
    )
    assert "max_logprob_diff" not in metrics
    assert "entropy" in metrics


@pytest.mark.parametrize(
    ("minibatches", "epochs", "groups", "expected"), [(2, 1, 5, 2), (2, 3, 5, 6), (8, 1, 3, 3)]
)
def test_minibatches_are_whole_groups_and_cover_all(
    make_model: Models, make_rows: Rows, minibatches: int, epochs: int, groups: int, expected: int
) -> None:
    model = make_model()
    learner = Learner(model, GRPOConfig(minibatches=minibatches, epochs=epochs))
    rows = groups_of(make_rows(model, 2 * groups))
    parts = list(minibatches_of(rows, learner.config, step=3))
    assert len(parts) == expected
    for epoch in range(epochs):
        size = expected // epochs
        indices = [index for part in parts[epoch * size : (epoch + 1) * size] for index in part]
        assert sorted(indices) == list(range(2 * groups))
    for part in parts:
        assert {index ^ 1 for index in part} == set(part)
    assert parts == list(minibatches_of(rows, learner.config, step=3))
    assert learner.learn(rows, step=3, stop=GO)["updates"] == expected


def test_the_global_random_state_is_left_alone(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows = groups_of(make_rows(model, 4))
    before = (random.getstate(), torch.get_rng_state())
    Learner(model, GRPOConfig()).learn(rows, step=1, stop=GO)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_learning_is_repeatable(make_model: Models, make_rows: Rows) -> None:
    results = []
    for _ in range(2):
        model = make_model()
        Learner(model, GRPOConfig(optimizer=OptimizerConfig(learning_rate=1e-3))).learn(
            groups_of(make_rows(model, 6)), step=1, stop=GO
        )
        results.append(weights(model))
    assert same(*results)


def test_dropout_is_off_while_learning(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    model.config.attention_dropout = 0.9
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.9
    rows = make_rows(model, 4)
    model.train()
    metrics = Learner(model, GRPOConfig(minibatches=1)).learn(groups_of(rows), step=1, stop=GO)
    assert metrics["max_logprob_diff"] < 1e-4
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert model.training


def test_weight_decay_and_frozen_parameters(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    frozen = model.get_decoder().layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    learner = Learner(model, GRPOConfig(optimizer=OptimizerConfig(weight_decay=0.1)))
    matrices, vectors = learner.optimizer.param_groups
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    learner.learn(groups_of(make_rows(model, 4)), step=1, stop=GO)
    assert torch.equal(frozen, before)


def test_gradients_are_clipped(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    learner = Learner(model, GRPOConfig(minibatches=1, optimizer=OptimizerConfig(max_grad_norm=1e-3)))
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))

    learner.optimizer.register_step_pre_hook(measure)
    metrics = learner.learn(groups_of(make_rows(model, 4)), step=1, stop=GO)
    assert metrics["grad_norm"] > 1e-2
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_the_learning_rate_of_the_step_is_used(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    learner = Learner(model, GRPOConfig(optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4)))
    metrics = learner.learn(groups_of(make_rows(model, 4)), step=2, stop=GO)
    assert metrics["learning_rate"] == 5e-4
    assert {group["lr"] for group in learner.optimizer.param_groups} == {5e-4}


@pytest.mark.parametrize("check", [True, False])
def test_a_nan_in_the_weights_is_named_and_nothing_is_applied(
    make_model: Models, make_rows: Rows, check: bool
) -> None:
    model = make_model()
    rows = groups_of(make_rows(model, 4))
    learner = Learner(model, GRPOConfig(check_on_policy=check))
    with torch.no_grad():
        model.get_decoder().norm.weight[0] = math.nan
    before = {name: value.nan_to_num(7.0) for name, value in weights(model).items()}
    name = "log_probs" if check else "loss"
    with pytest.raises(GymError, match=rf"^{name} is nan in update 1 of step 5"):
        learner.learn(rows, step=5, stop=GO)
    assert same(before, {name: value.nan_to_num(7.0) for name, value in weights(model).items()})
    assert not learner.optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_infinite_gradient_is_named_and_nothing_is_applied(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows = groups_of(make_rows(model, 4))
    learner = Learner(model, GRPOConfig())
    before = weights(model)
    model.get_decoder().norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(GymError, match=r"^grad_norm is (nan|inf) in update 1 of step 2"):
        learner.learn(rows, step=2, stop=GO)
    assert same(before, weights(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stopping_before_the_first_update_changes_nothing(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows = groups_of(make_rows(model, 6))
    learner = Learner(model, GRPOConfig(max_tokens_per_microbatch=1, check_on_policy=False))
    before, stop = weights(model), threading.Event()
    passes: list[int] = []

    def stop_at_the_second(*_args: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            stop.set()

    hook = model.get_decoder().register_forward_hook(stop_at_the_second)
    with pytest.raises(LearningStoppedError):
        learner.learn(rows, step=1, stop=stop)
    hook.remove()
    assert len(passes) == 2
    assert same(before, weights(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stopping_after_the_first_update_finishes_the_step(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows = groups_of(make_rows(model, 6))
    twin = copy.deepcopy(model)
    stop = threading.Event()
    learner = Learner(model, GRPOConfig(max_tokens_per_microbatch=1))
    learner.optimizer.register_step_post_hook(lambda *_args: stop.set())
    assert learner.learn(rows, step=1, stop=stop)["updates"] == 2
    Learner(twin, GRPOConfig(max_tokens_per_microbatch=1)).learn(rows, step=1, stop=GO)
    assert same(weights(model), weights(twin))
