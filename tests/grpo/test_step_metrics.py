"""The numbers of a step against plain loops: rollouts, mismatch, staleness, updates."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.grpo import GRPOConfig, select_rows
from gym_sdk.grpo.alarms import AlarmConfig, AlarmName
from gym_sdk.grpo.losses.stats import LossStats
from gym_sdk.grpo.metrics import (
    learning_metrics,
    mismatch_metrics,
    rollout_metrics,
    staleness_metrics,
    token_ages,
)
from gym_sdk.schema import Group, Outcome, Rollout, Task
from gym_sdk.tokens import CallTokens, TokenSequence, WeightSpan

Make = Callable[..., Rollout]
CALL = CallTokens([1, 2], [3, 4, 5], [-0.5, -0.6, -0.7])
LATER = CallTokens([1, 2, 3, 4, 5, 6], [7], [-0.1])


def group(make_rollout: Make, name: str, *rewards: float | None) -> Group:
    task = Task("x", id=name)
    rollouts = [
        make_rollout(task, index, calls=[CALL], reward=reward)
        if reward is not None
        else make_rollout(task, index, outcome=Outcome.FAILED)
        for index, reward in enumerate(rewards)
    ]
    return Group(task=task, rollouts=rollouts)


def described(groups: Sequence[Group]) -> dict[str, float]:
    return rollout_metrics(groups, select_rows(groups, GRPOConfig(), vocab_size=10))


def test_metrics_describe_the_rollouts(make_rollout: Make) -> None:
    task = Task("x", id="b")
    truncated = make_rollout(task, 0, calls=[CALL, LATER], reward=0.5, outcome=Outcome.TRUNCATED)
    cancelled = make_rollout(task, 1, outcome=Outcome.CANCELLED)
    truncated.metrics |= {
        "forks": 2.0,
        "unreported_forks": 1.0,
        "unparsed_calls": 3.0,
        "tools_offered": 2.0,
        "tool_calls": 4.0,
    }
    groups = [group(make_rollout, "a", 1.0, 0.0, None), Group(task=task, rollouts=[truncated, cancelled])]
    assert described(groups) == pytest.approx(
        {
            "rollouts": 5,
            "valid": 3,
            "failed": 1,
            "failed_share": 1 / 5,
            "cancelled": 1,
            "truncated": 1,
            "truncated_share": 1 / 3,
            "groups": 2,
            "groups_kept": 1,
            "groups_dropped": 1,
            "groups_no_variance": 0,
            "groups_too_few": 1,
            "groups_flat_share": 0.0,
            "groups_all_zero_share": 0.0,
            "groups_all_one_share": 0.0,
            "bad_log_probs": 0,
            "empty_rollouts": 0,
            "overlong_rollouts": 0,
            "too_long_rows": 0,
            "too_old_tokens": 0,
            "extra_rows": 0,
            "forks": 2,
            "unreported_forks": 1,
            "unparsed_calls": 3,
            "lost_states": 0,
            "tool_rollouts": 1,
            "tool_calls": 4,
            "prompt_tokens": 2 + 2 + 3,
            "generated_tokens": 3 + 3 + 4,
            "trained_tokens": 6,
            "reward_mean": 0.5,
            "reward_std": math.sqrt(1 / 6),
            "generated_tokens_mean": 10 / 3,
            "generated_tokens_p95": 4,
            "generated_tokens_p99": 4,
            "turns_mean": 4 / 3,
            "turns_p95": 2,
            "turns_p99": 2,
            "tool_calls_mean": 0,
        }
    )


def test_metrics_without_any_reward_have_no_means(make_rollout: Make) -> None:
    metrics = described([group(make_rollout, "a", None, None)])
    assert (metrics["failed"], metrics["failed_share"]) == (2, 1.0)
    for name in ("reward_mean", "turns_p99", "truncated_share", "groups_flat_share"):
        assert name not in metrics
    assert "failed_share" not in described([])


def test_what_is_left_out_is_counted(make_rollout: Make) -> None:
    bad = CallTokens([1, 2], [3, 4], [-0.5, -0.6])
    bad.generation_log_probs[1] = math.nan
    task = Task("x", id="a")
    broken = [make_rollout(task, index, calls=[bad], reward=float(index)) for index in range(2)]
    metrics = described([Group(task=task, rollouts=broken)])
    assert (metrics["bad_log_probs"], metrics["groups_too_few"], metrics["reward_mean"]) == (2, 1, 0.5)
    assert "generated_tokens_mean" not in metrics

    long = make_rollout(task, 1, calls=[CALL, LATER], reward=0.0)
    cut = make_rollout(task, 2, calls=[CALL], reward=0.5, outcome=Outcome.TRUNCATED)
    empty = make_rollout(task, 3, reward=0.1)
    groups = [Group(task=task, rollouts=[*group(make_rollout, "a", 1.0).rollouts, long, cut, empty])]
    config = GRPOConfig(max_row_tokens=6, overlong="mask")
    metrics = rollout_metrics(groups, select_rows(groups, config, vocab_size=10))
    names = ("too_long_rows", "overlong_rollouts", "empty_rollouts", "too_old_tokens")
    assert [metrics[name] for name in names] == [1, 1, 1, 0]


def test_flat_groups_are_counted_whether_they_are_dropped_or_not(make_rollout: Make) -> None:
    groups = [
        group(make_rollout, "a", 0.0, 0.0, None),
        group(make_rollout, "b", 1.0, 1.0),
        group(make_rollout, "c", 0.5, 0.5),
        group(make_rollout, "d", 1.0, 0.0),
        group(make_rollout, "e", 0.0, None),  # one reward says nothing about variance
    ]
    for drop in (True, False):
        config = GRPOConfig(drop_zero_variance=drop)
        metrics = rollout_metrics(groups, select_rows(groups, config, vocab_size=10))
        assert metrics["groups_no_variance"] == (3 if drop else 0)
        shares = [metrics[f"groups_{kind}_share"] for kind in ("flat", "all_zero", "all_one")]
        assert shares == [0.75, 0.25, 0.25]


def test_percentiles_are_nearest_rank(make_rollout: Make) -> None:
    task = Task("x", id="a")
    rollouts = []
    for index in range(200):  # generations of 1 to 200 tokens
        call = CallTokens([1], [2] * (index + 1), [-0.1] * (index + 1))
        rollouts.append(make_rollout(task, index, calls=[call], reward=float(index)))
    random.Random(0).shuffle(rollouts)
    metrics = described([Group(task=task, rollouts=rollouts)])
    assert metrics["generated_tokens_p95"] == 190
    assert metrics["generated_tokens_p99"] == 198


def row(*versions: str | None, name: str = "r", prompt: int = 2) -> TokenSequence:
    """A row with one trained token for each version; None: the engine did not say which."""
    size = prompt + len(versions)
    spans = [
        WeightSpan(version, prompt + index, prompt + index + 1)
        for index, version in enumerate(versions)
        if version is not None
    ]
    mask = [0] * prompt + [1] * len(versions)
    return TokenSequence([1] * size, mask, [0.0] * size, weight_versions=spans, rollout_id=name)


NUMBERS = {"step-000003": 3, "step-000005": 5, "step-000007": 7}


def test_ages_count_versions_back_from_the_trainers() -> None:
    rows = [row("step-000005", "step-000003", "other", None), row("step-000007")]
    first, second = token_ages(rows, version=5, number_of=NUMBERS.get)
    assert first.tolist() == [-1, -1, 0, 2, -1, -1]
    assert second.tolist() == [-1, -1, -1]  # newer than the trainer's: from before a resume


def test_staleness_is_over_the_tokens_of_known_age() -> None:
    rows = [
        row("step-000005", "step-000005", "step-000003", name="a"),
        row("step-000003", "step-000003", name="b"),
        row(None, name="c"),
        row("step-000003", name="d"),
        row("step-000005", name="d"),  # two rows of one rollout
    ]
    metrics = staleness_metrics(rows, token_ages(rows, version=5, number_of=NUMBERS.get))
    assert metrics == pytest.approx(
        {
            "staleness_mean": (2 + 2 + 2 + 2) / 7,
            "staleness_max": 2,
            "stale_tokens_share": 4 / 7,
            "unversioned_tokens": 1,
            "rollouts_spanning_versions": 2,
        }
    )
    unknown = [row(None, None)]
    assert staleness_metrics(unknown, token_ages(unknown, version=5, number_of=NUMBERS.get)) == {
        "unversioned_tokens": 2,
        "rollouts_spanning_versions": 0,
    }


LOG_PROB = st.floats(-30.0, 0.0)
TOKEN = st.tuples(st.booleans(), LOG_PROB, LOG_PROB, st.integers(-1, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TOKEN, min_size=1, max_size=6), min_size=1, max_size=4))
def test_mismatch_equals_a_plain_loop(tokens: list[list[tuple[bool, float, float, int]]]) -> None:
    rows, scores, ages = [], [], []
    for line in [*tokens, [(True, -1.0, -1.5, 0)]]:
        rows.append(TokenSequence([1] * len(line), [int(t[0]) for t in line], [t[1] for t in line]))
        scores.append(torch.tensor([t[2] for t in line if t[0]], dtype=torch.float64))
        ages.append(torch.tensor([t[3] for t in line]))
    fresh, stale = [], []
    for used, score, age in zip(rows, scores, ages, strict=True):
        trained = [index for index in range(len(used)) if used.loss_mask[index]]
        for value, index in zip(score.tolist(), trained, strict=True):
            (stale if age[index] > 0 else fresh).append(value - used.log_probs[index])

    def exp(value: float) -> float:
        return math.exp(max(-20.0, min(20.0, value)))

    expected = {
        "max_logprob_diff": max(abs(d) for d in fresh),
        "token_mult_prob_error": sum(exp(abs(d)) for d in fresh) / len(fresh),
        "gen_kl": sum(exp(d) - 1.0 - max(-20.0, min(20.0, d)) for d in fresh) / len(fresh),
        "sampling_importance_ratio": sum(exp(d) for d in fresh) / len(fresh),
        "mismatched_tokens_share": sum(exp(abs(d)) > 1.05 for d in fresh) / len(fresh),
    }
    if stale:
        expected["stale_ratio_mean"] = sum(exp(d) for d in stale) / len(stale)
        expected["stale_ratio_max"] = max(exp(d) for d in stale)
    assert mismatch_metrics(scores, rows, ages=ages) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_mismatch_is_only_of_what_the_present_weights_sampled() -> None:
    rows = [row("step-000003", "step-000003")]
    ages = token_ages(rows, version=5, number_of=NUMBERS.get)
    scores = [torch.tensor([-900.0, 900.0])]
    metrics = mismatch_metrics(scores, rows, ages=ages)
    assert metrics == pytest.approx(
        {"stale_ratio_mean": (math.exp(20) + math.exp(-20)) / 2, "stale_ratio_max": math.exp(20)}
    )
    assert json.loads(json.dumps(metrics)) == metrics
    assert mismatch_metrics(scores, rows)["max_logprob_diff"] == 900.0
    assert mismatch_metrics(scores, rows)["token_mult_prob_error"] == pytest.approx(math.exp(20))


def test_updates_are_described_by_means() -> None:
    stats = LossStats(
        tokens=10.0,
        rows=4.0,
        loss=3.0,
        policy_loss=2.0,
        kl_loss=1.5,
        entropy_loss=-0.5,
        ratio=11.0,
        ratio_min=0.5,
        ratio_max=2.0,
        clipped_low=1.0,
        clipped_high=2.0,
        dual_clipped=3.0,
        behaviour_kl=0.1,
        reference_kl=0.2,
        entropy=5.0,
        correction_weight=9.0,
        truncated_tokens=4.0,
        masked_tokens=5.0,
        masked_rows=1.0,
    )
    assert learning_metrics(stats, [0.5, 1.5]) == pytest.approx(
        {
            "updates": 2,
            "loss": 1.5,
            "policy_loss": 1.0,
            "kl_loss": 0.75,
            "entropy_loss": -0.25,
            "grad_norm": 1.0,
            "grad_norm_max": 1.5,
            "entropy": 0.5,
            "ratio_mean": 1.1,
            "ratio_min": 0.5,
            "ratio_max": 2.0,
            "clip_low_fraction": 0.1,
            "clip_high_fraction": 0.2,
            "dual_clip_fraction": 0.3,
            "approx_kl": 0.01,
            "reference_kl": 0.02,
            "correction_weight_mean": 0.9,
            "correction_truncated_fraction": 0.4,
            "correction_masked_fraction": 0.5,
            "correction_masked_rows_fraction": 0.25,
        }
    )
    assert "entropy" not in learning_metrics(LossStats(tokens=1.0, rows=1.0), [1.0])


def test_the_documentation_has_every_name(make_rollout: Make) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training_metrics.md").read_text(encoding="utf-8")
    rows = [row("step-000005", "step-000003")]
    ages = token_ages(rows, version=5, number_of=NUMBERS.get)
    zeros = [torch.zeros(rows[0].trained_tokens)]
    named = [
        *described([group(make_rollout, "a", 1.0, 0.0)]),
        *staleness_metrics(rows, ages),
        *mismatch_metrics(zeros, rows, ages=ages),
        *learning_metrics(LossStats(tokens=1.0, rows=1.0, entropy=1.0), [1.0]),
        *AlarmName,
        *(field.name for field in fields(AlarmConfig)),
    ]
    assert [name for name in named if f"`{name}`" not in text] == []
