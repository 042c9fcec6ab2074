"""The numbers of a run: every outcome is counted, nothing without a reward counts as 0, memory is bounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.scored import group_of, scored

from gym_sdk.errors import TransportError
from gym_sdk.metrics import MetricsConfig, RunMetrics, Throughput
from gym_sdk.schema import (
    Cancellation,
    Failure,
    FailureKind,
    Group,
    ModelCall,
    Outcome,
    Stage,
    Task,
    Timing,
    Truncation,
)
from gym_sdk.tokens import CallTokens

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def failed(stage: Stage = Stage.MODEL_CALL, **fields: Any) -> Any:
    failure = Failure.of(TransportError("refused", retryable=False), stage)
    return scored(None, outcome=Outcome.FAILED, failure=failure, **fields)


def varied_groups() -> list[Group]:
    """Return groups in which everything that has a name happens."""
    calls = [
        ModelCall(
            response_id="a",
            first_item=0,
            end_item=1,
            tokens=CallTokens([1] * 4, [2] * 3, [-1.0] * 3),
            retries=2,
        ),
        ModelCall(response_id="b", first_item=0, end_item=1, tokens=CallTokens([1] * 9, [2] * 5, [-1.0] * 5)),
    ]
    timing = Timing(started_at=0.0, duration_s=10.0, model_s=6.0, tool_s=1.0, verifier_s=0.5)
    metrics = {
        "turns": 2.0,
        "tool_calls": 3.0,
        "tool_errors": 1.0,
        "staleness": 2.0,
        "forks": 1.0,
        "length": 7.0,
    }
    rich = scored(
        1.0,
        model_calls=calls,
        timing=timing,
        metrics=metrics,
        reward_components={"format": 0.5, "answer": 1.0},
    )
    truncated = scored(0.0, outcome=Outcome.TRUNCATED, truncation=Truncation.TURNS)
    late = scored(None, outcome=Outcome.CANCELLED, cancellation=Cancellation.STRAGGLER, model_calls=calls)
    mixed = [rich, truncated, late, failed(), failed(Stage.VERIFIER)]
    return [
        Group(task=Task("q", id="mixed"), rollouts=mixed),
        group_of([1.0, 1.0]),
        group_of([0.0, 0.0, 0.0, 0.0]),
        group_of([None]),
    ]


def test_a_mixed_run_in_numbers() -> None:
    numbers = RunMetrics.of(varied_groups(), duration_s=4.0).metrics()
    expected = {
        "rollouts": 12,
        "groups": 4,
        "outcomes/completed": 7,
        "outcomes/truncated": 1,
        "outcomes/failed": 2,
        "outcomes/cancelled": 2,
        "truncations/turns": 1,
        "truncations/tokens": 0,
        "cancellations/straggler": 1,
        "failures/transport": 2,
        "failures/deadline": 0,
        "errors/model_call/TransportError": 1,
        "errors/verifier/TransportError": 1,
        "reward/count": 8,
        "reward/mean": 3 / 8,
        "reward_components/format_mean": 0.5,
        "verifier_metrics/length_mean": 7,
        "groups/without_reward": 1,
        "groups/flat_share": 2 / 3,
        "groups/all_zero_share": 1 / 3,
        "groups/all_one_share": 1 / 3,
        "pass_at/2": (1 + 1 + 0) / 3,
        "pass_hat/2": (0 + 1 + 0) / 3,
        "pass_left_out/2": 1,
        "pass_at/4": 0,
        "pass_left_out/4": 3,
        "tokens/prompt_max": 4,
        "tokens/generated_max": 8,
        "tokens/generated_p50": 3,
        "tokens/sequence_max": 14,
        "calls/turns_max": 2,
        "calls/tool_calls_max": 3,
        "calls/retries_max": 2,
        "time/rollout_s_max": 10,
        "time/wait_s_max": 2.5,
        "staleness/steps_mean": 2,
        "totals/model_calls": 2 + 2 + 10,
        "totals/generated_tokens": 8 + 8 + 10 * 3,
        "totals/retries": 4,
        "totals/tool_calls": 3,
        "totals/forks": 1,
        "throughput/rollouts_per_s": 3,
    }
    assert {name: numbers.get(name) for name in expected} == pytest.approx(expected)
    assert "pass_at/8" not in numbers
    assert not any(name.startswith("throughput/recent") for name in numbers)
    assert all(type(value) is float for value in numbers.values())


def test_what_was_stopped_is_in_no_distribution() -> None:
    run = RunMetrics()
    run.add_rollout(scored(None, outcome=Outcome.CANCELLED, cancellation=Cancellation.CALLER))
    run.add_rollout(failed())
    numbers = run.metrics()
    assert not any(name.startswith(("tokens/", "calls/", "time/", "pass_")) for name in numbers)
    assert "reward/mean" not in numbers
    assert numbers["reward/count"] == 0
    assert numbers["totals/generated_tokens"] == 6


def test_rollouts_whose_tokens_are_unknown_have_no_lengths() -> None:
    run = RunMetrics()
    call = ModelCall(response_id="a", first_item=0, end_item=0)
    run.add_rollout(scored(1.0, model_calls=[call]))
    run.add_rollout(scored(1.0, model_calls=[]))
    numbers = run.metrics()
    assert numbers["calls/turns_max"] == 1
    assert not any(name.startswith("tokens/") for name in numbers)


def test_concurrent_calls_leave_no_negative_wait() -> None:
    run = RunMetrics()
    run.add_rollout(scored(1.0, timing=Timing(started_at=0.0, duration_s=1.0, tool_s=5.0)))
    assert run.metrics()["time/wait_s_max"] == 0.0


def test_every_name_is_in_the_docs() -> None:
    run = RunMetrics()
    for group in varied_groups():
        for rollout in group.rollouts:
            run.add_rollout(rollout)
        run.add_group(group)
    section = DOCS.read_text(encoding="utf-8").split("## Names")[1].split("## Trackers")[0]
    patterns = set()
    for row in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            pattern = re.escape(name).replace("…", "(mean|p50|p95|p99|max)")
            patterns.add(re.sub(r"[A-Z]{1,}", r"[^/]+", pattern))
    numbers = run.metrics()
    undocumented = [name for name in numbers if not any(re.fullmatch(p, name) for p in patterns)]
    assert undocumented == []
    unused = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in numbers)]
    assert unused == []


def test_closed_sets_are_whole_from_the_start() -> None:
    numbers = RunMetrics().metrics()
    for family, members in (
        ("outcomes", Outcome),
        ("truncations", Truncation),
        ("cancellations", Cancellation),
        ("failures", FailureKind),
    ):
        assert {name for name in numbers if name.startswith(f"{family}/")} == {
            f"{family}/{member}" for member in members
        }
        assert all(numbers[f"{family}/{member}"] == 0 for member in members)


def test_names_that_a_run_makes_up_are_bounded() -> None:
    run = RunMetrics(MetricsConfig(most_names=3))
    for n in range(10):
        run.add_rollout(scored(1.0, reward_components={f"c{n}": 1.0}, metrics={f"m{n}": float(n)}))
        failure = Failure(error=f"Error{n}", message="", where=Stage.TOOL)
        run.add_rollout(scored(None, outcome=Outcome.FAILED, failure=failure))
    numbers = run.metrics()
    assert sorted(name for name in numbers if name.startswith("errors/")) == [
        "errors/other",
        "errors/tool/Error0",
        "errors/tool/Error1",
        "errors/tool/Error2",
    ]
    assert numbers["errors/other"] == 7
    assert sum(name.startswith("reward_components/") for name in numbers) == 4
    assert sum(name.startswith("verifier_metrics/") for name in numbers) == 4


def test_the_threshold_and_the_ks_are_settings() -> None:
    config = MetricsConfig(threshold=0.5, ks=(3,))
    numbers = RunMetrics.of([group_of([0.5, 0.2, 0.1])], config=config).metrics()
    assert numbers["pass_at/3"] == 1.0
    assert "pass_at/1" not in numbers
    assert not any(name.startswith("throughput") for name in numbers)


def test_a_single_reward_makes_no_flat_group() -> None:
    numbers = RunMetrics.of([group_of([1.0]), group_of([0.0, None])]).metrics()
    assert not any(name.endswith("_share") for name in numbers)
    numbers = RunMetrics.of([group_of([1.0]), group_of([0.0, 1.0])]).metrics()
    assert numbers["groups/flat_share"] == 0.0


def test_throughput_over_the_run_and_lately() -> None:
    clock = Clock()
    throughput = Throughput(window_s=60.0, clock=clock)
    assert throughput.metrics() == {}
    for _ in range(300):
        clock.now += 1.0
        throughput.add(10)
    for _ in range(30):
        clock.now += 2.0
        throughput.add(10)
    numbers = throughput.metrics()
    assert numbers["throughput/rollouts_per_s"] == pytest.approx(330 / 360)
    assert numbers["throughput/recent_rollouts_per_s"] == pytest.approx(0.5, rel=0.05)
    assert numbers["throughput/recent_generated_tokens_per_s"] == pytest.approx(5.0, rel=0.05)
    assert len(throughput._buckets) <= 62
    clock.now += 1_000.0
    assert throughput.metrics()["throughput/recent_rollouts_per_s"] == 0.0


def test_a_young_run_has_been_recent_for_as_long_as_it_runs() -> None:
    clock = Clock()
    run = RunMetrics(clock=clock)
    run.add_rollout(scored(1.0))
    clock.now += 2.0
    numbers = run.metrics()
    assert numbers["throughput/recent_rollouts_per_s"] == numbers["throughput/rollouts_per_s"] == 0.5
