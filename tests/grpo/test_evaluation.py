"""Evaluations between steps: what counts, what is best, when to stop, and going on after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.grpo import GRPOConfig, GRPOTrainer, OptimizerConfig
from gym_sdk.grpo.evaluation import EarlyStop, EvalResult, Evaluation, EvaluationPlan, evaluate
from gym_sdk.schema import Failure, FunctionCall, Group, Outcome, Rollout, Task
from gym_sdk.tokens import CallTokens

Models = Callable[..., PreTrainedModel]
Make = Callable[..., Rollout]
GroupOf = Callable[..., Group]
CALL = CallTokens([1, 2], [3, 4], [-0.5, -0.6])
FAILURE = Failure(error="TransportError", message="connection refused", where="model_call")


@pytest.fixture
def group_of(make_rollout: Make) -> GroupOf:
    def build(task: Task, *rewards: float | None, calls: Sequence[CallTokens | None] = ()) -> Group:
        rollouts = [
            make_rollout(task, index, reward=reward, calls=calls)
            if reward is not None
            else make_rollout(task, index, outcome=Outcome.FAILED, failure=FAILURE)
            for index, reward in enumerate(rewards)
        ]
        return Group(task=task, rollouts=rollouts)

    return build


class Scores:
    """A source whose next rollouts all have the given reward; None: they all fail."""

    def __init__(self, group_of: GroupOf, *rewards: float | None) -> None:
        self.group_of = group_of
        self.rewards = list(rewards)
        self.runs = 0

    @asynccontextmanager
    async def __call__(self, tasks: Sequence[Task], /) -> AsyncIterator[AsyncIterator[Group]]:
        reward = self.rewards[self.runs]
        self.runs += 1

        async def groups() -> AsyncIterator[Group]:
            for task in tasks:
                yield self.group_of(task, reward)

        yield groups()


@pytest.mark.asyncio
async def test_a_result_describes_rollouts_by_task(
    make_source: Any, group_of: GroupOf, tasks: list[Task]
) -> None:
    calls = [CALL, CallTokens([1, 2, 3, 4, 5], [6], [-0.1])]
    groups = [
        group_of(tasks[1], 0.0, 1.0, calls=calls),
        group_of(tasks[0], 1.0, None, calls=calls),
        group_of(tasks[2], None),
    ]
    groups[0].rollouts[0].items = [FunctionCall(call_id="c", name="add", arguments="{}")]
    result = await evaluate(make_source(groups), tasks[:3])
    assert [group.task.id for group in result.groups] == ["t0", "t1", "t2"]
    assert (result.mean_reward, result.score, result.rollouts, result.valid) == (0.75, 0.75, 5, 3)
    assert result.outcomes == {"completed": 3, "failed": 2}
    metrics = result.metrics("held_out")
    assert metrics.pop("held_out/seconds") > 0.0
    assert metrics == pytest.approx(
        {
            "held_out/rollouts": 5,
            "held_out/valid": 3,
            "held_out/completed": 3,
            "held_out/truncated": 0,
            "held_out/failed": 2,
            "held_out/cancelled": 0,
            "held_out/reward_mean": 0.75,  # of the tasks' means 1 and 1/2
            "held_out/reward_error": math.sqrt((0.25**2 + 0.25**2) / (1 * 2)),
            "held_out/pass_at_1": 0.75,
            "held_out/pass_at_2": 1.0,  # of the one task with two rewards
            "held_out/turns_mean": 2.0,
            "held_out/tool_calls_mean": 1 / 3,
            "held_out/generated_tokens_mean": 3.0,
        }
    )


@pytest.mark.asyncio
async def test_correct_is_what_reaches_the_threshold(
    make_source: Any, group_of: GroupOf, tasks: list[Task]
) -> None:
    groups = [group_of(tasks[0], 0.5, 0.1, 0.1, 0.1), group_of(tasks[1], 0.1, 0.1, 0.1, 0.1)]
    passes = (await evaluate(make_source(groups), tasks[:2], threshold=0.5)).pass_at
    assert {k: estimate.value for k, estimate in passes.items()} == pytest.approx(
        {1: 0.25 / 2, 2: 0.5 / 2, 4: 0.5}
    )


def test_lengths_need_tokens(group_of: GroupOf, tasks: list[Task]) -> None:
    metrics = EvalResult.of([group_of(tasks[0], 1.0, calls=[None])]).metrics()
    assert metrics["eval/turns_mean"] == 1.0
    assert "eval/generated_tokens_mean" not in metrics
    assert "eval/reward_error" not in metrics  # one task


@pytest.mark.asyncio
async def test_failures_are_no_score_and_are_warned_of(
    make_source: Any, group_of: GroupOf, tasks: list[Task], caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source([group_of(tasks[0], 1.0, None), group_of(tasks[1], 1.0, 1.0)])
    result = await Evaluation(source, tasks[:2], min_valid_share=0.75).run(3)
    assert (result.score, result.failure) == (1.0, None)
    assert not caplog.records
    result = await Evaluation(source, tasks[:2], name="hard", min_valid_share=0.76).run(3)
    assert (result.score, result.mean_reward) == (None, 1.0)
    assert "step 3: hard has no score and counts for nothing: only 3 of 4 rollouts" in caplog.text
    assert "TransportError in model_call: connection refused" in caplog.text

    result = await Evaluation(make_source([group_of(tasks[0], None)]), tasks[:1]).run(3)
    assert (result.score, result.mean_reward) == (None, None)
    assert result.failure is not None
    assert "no rollout has a reward; most often (1 times): TransportError" in result.failure
    result = await evaluate(make_source([]), tasks[:1])
    assert result.failure == "no rollout has a reward; the rollout source returned no rollouts"


@pytest.mark.asyncio
async def test_cancelled_rollouts_are_not_missed(
    make_source: Any, make_rollout: Make, group_of: GroupOf, tasks: list[Task]
) -> None:
    """Groups that were over-sampled have some, and nothing went wrong."""
    group = group_of(tasks[0], 1.0)
    group.rollouts += [make_rollout(tasks[0], index, outcome=Outcome.CANCELLED) for index in (1, 2)]
    assert (await Evaluation(make_source([group]), tasks[:1]).run(0)).score == 1.0
    group.rollouts.append(make_rollout(tasks[0], 3, outcome=Outcome.FAILED, failure=FAILURE))
    result = await Evaluation(make_source([group]), tasks[:1]).run(0)
    assert result.failure is not None
    assert result.failure.startswith("only 1 of 2 rollouts have a reward; most often (1 times): TransportErr")
    group.rollouts = group.rollouts[1:3]
    assert (await evaluate(make_source([group]), tasks[:1])).failure == (
        "no rollout has a reward; most often (2 times): cancelled"
    )


@pytest.mark.asyncio
async def test_an_evaluation_has_a_deadline(group_of: GroupOf, tasks: list[Task]) -> None:
    closed: list[bool] = []

    @asynccontextmanager
    async def slow(tasks: Sequence[Task], /) -> AsyncIterator[AsyncIterator[Group]]:
        async def groups() -> AsyncIterator[Group]:
            yield group_of(tasks[0], 1.0)
            await anyio.sleep_forever()

        try:
            yield groups()
        finally:
            closed.append(True)

    result = await Evaluation(slow, tasks[:2], timeout_s=0.05).run(1)
    assert result.failure == "it did not finish within 0.05 s (1 of 2 groups did)"
    assert (result.score, result.valid, closed) == (None, 1, [True])


@pytest.mark.asyncio
async def test_only_failures_of_infrastructure_are_survived(tasks: list[Task]) -> None:
    def raising(error: Exception) -> Any:
        @asynccontextmanager
        async def source(tasks: Sequence[Task], /) -> AsyncIterator[AsyncIterator[Group]]:
            raise error
            yield

        return source

    gone = TransportError("connection refused", retryable=True)
    result = await Evaluation(raising(gone), tasks[:1]).run(1)
    assert result.failure == "the policy was not reached: connection refused"
    assert result.metrics()["eval/rollouts"] == 0
    with pytest.raises(ZeroDivisionError):
        await Evaluation(raising(ZeroDivisionError()), tasks[:1]).run(1)


@pytest.mark.asyncio
async def test_a_reward_that_is_not_finite_is_an_error(
    make_source: Any, group_of: GroupOf, tasks: list[Task]
) -> None:
    with pytest.raises(ConfigurationError, match=r"rollout t0/1: a reward must be finite: nan"):
        await evaluate(make_source([group_of(tasks[0], 1.0, math.nan)]), tasks[:1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tasks", []),
        ("every", 0),
        ("name", ""),
        ("name", "a/b"),
        ("patience", 0),
        ("target", math.nan),
        ("min_delta", -0.1),
        ("threshold", math.inf),
        ("min_valid_share", 0.0),
        ("timeout_s", 0.0),
    ],
)
def test_bad_settings_are_refused(make_source: Any, tasks: list[Task], field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"Evaluation\.{field} must be "):
        Evaluation(**({"rollouts": make_source([]), "tasks": tasks} | {field: value}))


def test_evaluations_are_due_at_the_start_every_so_often_and_at_the_end(
    make_source: Any, tasks: list[Task]
) -> None:
    evaluation = Evaluation(make_source([]), tasks, every=3)
    assert [step for step in range(9) if evaluation.is_due(step, last_step=8)] == [0, 3, 6, 8]
    late = Evaluation(make_source([]), tasks, every=3, at_start=False)
    assert [step for step in range(9) if late.is_due(step)] == [3, 6]


def stop_after(scores: Sequence[float | None], **settings: Any) -> tuple[EarlyStop, list[str | None]]:
    stop = EarlyStop(Evaluation(lambda _tasks: pytest.fail("it ran"), [Task("x")], **settings))
    reasons = []
    for step, score in enumerate(scores):
        stop.add(step, score)
        reasons.append(stop.stop_reason)
    return stop, reasons


def test_patience_counts_evaluations_since_the_best() -> None:
    stop, reasons = stop_after([0.1, 0.3, 0.2, 0.3, 0.25], patience=3)
    assert reasons[:4] == [None] * 4
    assert reasons[4] == "eval has not improved in 3 evaluations: 0.3 at step 1 is still the best"
    assert (stop.best_score, stop.best_step) == (0.3, 1)


def test_an_evaluation_without_score_uses_up_no_patience() -> None:
    stop, reasons = stop_after([None, 0.3, None, 0.2, None, None, None], patience=2)
    assert reasons == [None] * 7
    assert (stop.best_step, stop.without_improvement) == (1, 1)


def test_improvements_within_the_margin_do_not_count_until_they_add_up() -> None:
    stop, _ = stop_after([0.5, 0.54, 0.58], min_delta=0.05)
    assert (stop.best_score, stop.best_step, stop.without_improvement) == (0.58, 2, 0)
    stop, _ = stop_after([0.5, 0.54, 0.55], min_delta=0.05)
    assert (stop.best_score, stop.best_step, stop.without_improvement) == (0.5, 0, 2)


def test_a_target_is_reached_by_a_score() -> None:
    _, reasons = stop_after([0.5, None, 0.9], target=0.9)
    assert reasons == [None, None, "eval reached its target: 0.9 >= 0.9"]
    _, reasons = stop_after([-2.0, -1.0], target=-1.0)
    assert reasons == [None, "eval reached its target: -1 >= -1"]


@pytest.mark.asyncio
async def test_a_resumed_plan_goes_on_exactly(group_of: GroupOf, tasks: list[Task]) -> None:
    scores = [0.1, 0.4, None, 0.3, 0.2, 0.1]

    def plan(source: Scores) -> EvaluationPlan:
        return EvaluationPlan([Evaluation(source, tasks[:1], every=2, patience=3, min_valid_share=0.5)])

    whole = plan(Scores(group_of, *scores))
    history = []
    for step in range(12):
        await whole.run(step)
        history.append((whole.early_stop.state(), whole.early_stop.stop_reason))

    for cut in (2, 4, 5, 8):
        source = Scores(group_of, *scores)
        first = plan(source)
        for step in range(cut + 1):
            await first.run(step)
        second = plan(source)
        second.restore(json.loads(json.dumps(first.state())))
        runs = source.runs
        assert await second.run(cut) == {}  # that is behind it
        assert source.runs == runs
        for step in range(cut + 1, 12):
            await second.run(step)
            assert (second.early_stop.state(), second.early_stop.stop_reason) == history[step]
    assert [reason is not None for _, reason in history] == [False] * 10 + [True] * 2


@pytest.mark.asyncio
async def test_the_first_of_several_decides(
    group_of: GroupOf, tasks: list[Task], caplog: pytest.LogCaptureFixture
) -> None:
    main, other = Scores(group_of, 0.2, 0.1), Scores(group_of, 0.5, 0.6, 0.7)
    evaluations = [Evaluation(main, tasks[:2], every=4), Evaluation(other, tasks[2:4], every=2, name="hard")]
    plan = EvaluationPlan(evaluations)
    results = {step: await plan.run(step) for step in range(5)}
    assert [list(result) for result in results.values()] == [
        ["eval", "hard"],
        [],
        ["hard"],
        [],
        ["eval", "hard"],
    ]
    assert (plan.early_stop.best_score, plan.early_stop.best_step) == (0.2, 0)

    turned = EvaluationPlan(evaluations[::-1])
    turned.restore(plan.state())
    assert turned.early_stop.best_score is None
    assert "the best step so far was that of the evaluation 'eval'; now 'hard' decides" in caplog.text
    assert await turned.run(4) == {}


def test_plans_that_mix_things_up_are_refused(make_source: Any, tasks: list[Task]) -> None:
    def named(name: str, **settings: Any) -> Evaluation:
        return Evaluation(make_source([]), tasks, name=name, **settings)

    with pytest.raises(ConfigurationError, match="at least one evaluation"):
        EvaluationPlan([])
    with pytest.raises(ConfigurationError, match="two evaluations have the name 'a'"):
        EvaluationPlan([named("a"), named("b"), named("a")])
    for settings in ({"patience": 3}, {"target": 1.0}, {"min_delta": 0.1}):
        with pytest.raises(ConfigurationError, match=r"only the first evaluation \('a'\) decides .* put 'b'"):
            EvaluationPlan([named("a"), named("b", **settings)])
        EvaluationPlan([named("b", **settings), named("a")])


@pytest.mark.asyncio
async def test_a_real_run_stops_at_its_target(
    make_model: Models, make_sampler: Any, tasks: list[Task]
) -> None:
    def twos(tokens: list[int]) -> float:
        return sum(token == 2 for token in tokens) / len(tokens)

    model = make_model()
    source = make_sampler(model, twos, group_size=8)
    plan = EvaluationPlan([Evaluation(source, tasks, every=4, target=0.6)])
    config = GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=8, max_steps=40)
    async with GRPOTrainer(model, rollouts=source, tasks=tasks, config=config) as trainer:
        await plan.run(trainer.step)
        first = plan.early_stop.best_score
        async for step in trainer:
            await plan.run(step.index)
            if plan.early_stop.stop_reason is not None:
                break
    assert first is not None
    assert first < 0.3
    assert 0 < trainer.step < 40
    assert plan.early_stop.best_step == trainer.step
    assert plan.early_stop.stop_reason is not None
    assert plan.early_stop.stop_reason.startswith("eval reached its target")
