"""The iteration: steps, failures, cancellation, and a live event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError, DeadlineError, GymError, TokenContractError, TransportError
from gym_sdk.grpo import GRPOConfig, GRPOTrainer, LossConfig, OptimizerConfig, evaluate
from gym_sdk.schema import Failure, Group, Outcome, Rollout, Task
from gym_sdk.tokens import CallTokens

Models = Callable[..., PreTrainedModel]
Make = Callable[..., Rollout]
CONFIG = GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=4)
CALL = CallTokens([1, 2], [3, 4], [-0.5, -0.6])


def twos(tokens: list[int]) -> float:
    return sum(token == 2 for token in tokens) / len(tokens)


def total(tokens: list[int]) -> float:
    """A reward that hardly ever is the same for all of a group."""
    return float(sum(tokens))


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Sync:
    """Counts pushes; can be slow, or fail."""

    def __init__(self) -> None:
        self.versions: list[str] = []
        self.delay_s = 0.0
        self.error: Exception | None = None

    async def push(self, model: PreTrainedModel, *, version: str) -> None:
        await anyio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        self.versions.append(version)


@pytest.mark.asyncio
async def test_steps_carry_metrics_groups_and_versions(
    make_model: Models, make_sampler: Any, tasks: list[Task], tmp_path: Path
) -> None:
    model, sync = make_model(), Sync()
    config = GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=3, max_steps=4)
    source = make_sampler(model, twos)
    async with GRPOTrainer(
        model, rollouts=source, tasks=tasks, sync=sync, config=config, output_dir=tmp_path
    ) as trainer:
        steps = [step async for step in trainer]
        with pytest.raises(StopAsyncIteration):
            await anext(trainer)
    assert [step.index for step in steps] == [1, 2, 3, 4]
    assert [step.weight_version for step in steps] == [f"step-{index:06d}" for index in range(1, 5)]
    assert sync.versions == [step.weight_version for step in steps]
    for step, asked in zip(steps, source.asked, strict=True):
        assert [group.task.id for group in step.groups] == asked
        assert step.metrics["max_logprob_diff"] <= 1e-4
        assert step.metrics["weight_version"] == step.index
        assert step.metrics["rollouts"] == 12
        parts = sum(step.metrics[f"seconds_{part}"] for part in ("rollout", "train", "sync"))
        assert 0 < parts <= step.seconds
        assert all(isinstance(value, int | float) for value in step.metrics.values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step.index} | step.metrics for step in steps]


@pytest.mark.asyncio
async def test_each_epoch_is_shuffled_anew_without_repeats(
    make_model: Models, make_sampler: Any, tasks: list[Task]
) -> None:
    model = make_model()
    source = make_sampler(model, twos)
    trainer = GRPOTrainer(model, rollouts=source, tasks=tasks, config=CONFIG)
    for _ in range(6):
        await anext(trainer)
    epochs = [source.asked[first] + source.asked[first + 1] for first in (0, 2, 4)]
    assert all(sorted(epoch) == [task.id for task in tasks] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.asyncio
async def test_tasks_without_ids_are_numbered_and_fewer_tasks_than_a_step_are_all_used(
    make_model: Models, make_sampler: Any
) -> None:
    model = make_model()
    source = make_sampler(model, twos)
    trainer = GRPOTrainer(model, rollouts=source, tasks=[Task("a"), Task("b")], config=CONFIG)
    await anext(trainer)
    assert sorted(source.asked[0]) == ["0", "1"]


def test_bad_tasks_are_refused(make_model: Models, make_sampler: Any) -> None:
    model = make_model()
    source = make_sampler(model, twos)
    with pytest.raises(ConfigurationError, match="two tasks have the id 'x'"):
        GRPOTrainer(model, rollouts=source, tasks=[Task("a", id="x"), Task("b", id="x")])
    with pytest.raises(ConfigurationError, match="at least one task"):
        GRPOTrainer(model, rollouts=source, tasks=[])


@pytest.mark.asyncio
async def test_a_step_without_variance_is_reported_and_changes_nothing(
    make_model: Models, make_sampler: Any, tasks: list[Task]
) -> None:
    model, sync = make_model(), Sync()
    rewards = {"on": False}
    source = make_sampler(model, lambda tokens: twos(tokens) if rewards["on"] else 1.0)
    trainer = GRPOTrainer(model, rollouts=source, tasks=tasks, sync=sync, config=CONFIG)
    before = weights(model)
    step = await anext(trainer)
    assert step.metrics["updates"] == 0
    assert step.metrics["groups_no_variance"] == step.metrics["groups_dropped"] == 4
    assert step.metrics["trained_tokens"] == step.metrics["train_tokens_per_s"] == 0
    assert "loss" not in step.metrics
    assert same(before, weights(model))
    assert sync.versions == []
    rewards["on"] = True
    step = await anext(trainer)
    assert step.index == 2
    assert step.metrics["updates"] == 2
    assert sync.versions == ["step-000002"]


@pytest.mark.asyncio
async def test_failed_rollouts_leave_the_update_alone(
    make_model: Models, make_sampler: Any, make_source: Any, make_rollout: Make, tasks: list[Task]
) -> None:
    sampler = make_sampler(make_model(), twos)
    groups = [sampler.group(task) for task in tasks[:4]]
    failed = [
        Group(
            task=group.task,
            rollouts=[
                *group.rollouts,
                make_rollout(group.task, 4, calls=[None], outcome=Outcome.FAILED),
                make_rollout(group.task, 5, calls=[CALL], outcome=Outcome.CANCELLED),
            ],
        )
        for group in groups
    ]
    results = []
    for given in (groups, failed):
        model = make_model()
        trainer = GRPOTrainer(model, rollouts=make_source(given), tasks=tasks[:4], config=CONFIG)
        step = await anext(trainer)
        results.append((weights(model), step.metrics))
    assert same(results[0][0], results[1][0])
    for name in ("reward_mean", "reward_std", "loss", "grad_norm", "trained_tokens"):
        assert results[0][1][name] == results[1][1][name]
    assert (results[1][1]["failed"], results[1][1]["cancelled"], results[1][1]["valid"]) == (4, 4, 16)


@pytest.mark.asyncio
async def test_when_everything_failed_the_most_common_failure_is_raised(
    make_model: Models, make_source: Any, make_rollout: Make, tasks: list[Task]
) -> None:
    def failure(name: str) -> Failure:
        return Failure(error=name, message="connection refused", where="model_call")

    rollouts = [
        make_rollout(tasks[0], 0, outcome=Outcome.FAILED, failure=failure("TransportError")),
        make_rollout(tasks[0], 1, outcome=Outcome.FAILED, failure=failure("DeadlineError")),
        make_rollout(tasks[0], 2, outcome=Outcome.FAILED, failure=failure("TransportError")),
    ]
    source = make_source([Group(task=tasks[0], rollouts=rollouts)])
    trainer = GRPOTrainer(make_model(), rollouts=source, tasks=tasks, config=CONFIG)
    expected = (
        r"none of the 3 rollouts has a reward; .*\(2 times\): TransportError in model_call: connection ref"
    )
    with pytest.raises(GymError, match=expected):
        await anext(trainer)
    assert trainer.step == 0

    source.groups = []
    with pytest.raises(GymError, match="returned no rollouts"):
        await anext(trainer)
    source.groups = [Group(task=tasks[0], rollouts=[make_rollout(tasks[0], calls=[CALL])])]
    with pytest.raises(GymError, match="is there a verifier"):
        await anext(trainer)


@pytest.mark.asyncio
async def test_missing_tokens_are_an_error(
    make_model: Models, make_source: Any, make_rollout: Make, tasks: list[Task]
) -> None:
    rollouts = [make_rollout(tasks[0], index, calls=[None], reward=float(index)) for index in range(2)]
    source = make_source([Group(task=tasks[0], rollouts=rollouts)])
    with pytest.raises(TokenContractError, match="carries no token ids"):
        await anext(GRPOTrainer(make_model(), rollouts=source, tasks=tasks, config=CONFIG))


@pytest.mark.asyncio
async def test_a_nan_names_the_metric_and_the_step(
    make_model: Models, make_sampler: Any, tasks: list[Task]
) -> None:
    model = make_model()
    trainer = GRPOTrainer(model, rollouts=make_sampler(make_model(), total), tasks=tasks, config=CONFIG)
    await anext(trainer)
    model.get_decoder().norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights(model)
    with pytest.raises(GymError, match="grad_norm is nan in update 1 of step 2; the update was not applied"):
        await anext(trainer)
    assert same(before, weights(model))
    assert trainer.step == 1


@pytest.mark.asyncio
async def test_a_failed_push_is_made_up_for_before_the_next_rollouts(
    make_model: Models, make_sampler: Any, tasks: list[Task], tmp_path: Path
) -> None:
    model, sync = make_model(), Sync()
    trainer = GRPOTrainer(
        model, rollouts=make_sampler(model, total), tasks=tasks, sync=sync, config=CONFIG, output_dir=tmp_path
    )
    sync.error = TransportError("gone", retryable=True)
    with pytest.raises(TransportError):
        await anext(trainer)
    assert trainer.step == 1
    sync.error = None
    assert (await anext(trainer)).index == 2
    assert sync.versions == ["step-000001", "step-000002"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.asyncio
async def test_a_push_has_a_deadline(make_model: Models, make_sampler: Any, tasks: list[Task]) -> None:
    model, sync = make_model(), Sync()
    sync.delay_s = 60.0
    config = GRPOConfig(tasks_per_step=2, sync_timeout_s=0.05)
    trainer = GRPOTrainer(model, rollouts=make_sampler(model, total), tasks=tasks, sync=sync, config=config)
    with pytest.raises(DeadlineError, match="pushing weights step-000001"):
        await anext(trainer)


@pytest.mark.asyncio
async def test_the_event_loop_stays_alive_while_training(
    make_model: Models, make_sampler: Any, make_source: Any, tasks: list[Task]
) -> None:
    model = make_model(hidden=128, layers=4)
    sampler = make_sampler(model, twos, group_size=8)
    source = make_source([sampler.group(task) for task in tasks])
    trainer = GRPOTrainer(model, rollouts=source, tasks=tasks, config=GRPOConfig(epochs=8, tasks_per_step=8))
    gaps: list[float] = []

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    heart = asyncio.create_task(beat())
    step = await anext(trainer)
    heart.cancel()
    gaps.sort()
    assert step.metrics["seconds_train"] > 0.1
    assert len(gaps) > step.metrics["seconds_train"] / 0.1
    assert gaps[len(gaps) // 2] < 0.1


class Blocked:
    """Blocks the training thread at a chosen forward pass until it is let go."""

    def __init__(self, model: PreTrainedModel, at: int) -> None:
        self.reached, self.go, self.passes = threading.Event(), threading.Event(), 0
        self.at = at
        self.handle = model.get_decoder().register_forward_hook(self._hook)

    def _hook(self, *_args: Any) -> None:
        self.passes += 1
        if self.passes == self.at:
            self.reached.set()
            self.go.wait(timeout=30)

    async def wait(self) -> None:
        await asyncio.to_thread(self.reached.wait, 30)


# One row in a micro-batch, no check: passes 1 to 8 are the first minibatch (2 groups), 9 to 16 the second.
SMALL = GRPOConfig(
    optimizer=OptimizerConfig(learning_rate=5e-3),
    tasks_per_step=4,
    max_tokens_per_microbatch=1,
    check_on_policy=False,
)


@pytest.mark.asyncio
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("at", "completed"), [(3, 0), (8, 0), (11, 1)])
async def test_cancelling_waits_and_leaves_a_whole_state(
    make_model: Models,
    make_sampler: Any,
    make_source: Any,
    tasks: list[Task],
    tmp_path: Path,
    native: bool,
    at: int,
    completed: int,
) -> None:
    torch.manual_seed(11)
    model, twin, sync = make_model(), make_model(), Sync()
    groups = [make_sampler(model, twos, group_size=4).group(task) for task in tasks[:4]]
    for group in groups:
        group.rollouts[0].reward = 2.0
    trainer = GRPOTrainer(
        model,
        rollouts=make_source(groups),
        tasks=tasks[:4],
        sync=sync,
        config=SMALL,
        output_dir=tmp_path,
    )
    before, block = weights(model), Blocked(model, at)
    scope = anyio.CancelScope()

    async def step() -> None:
        with scope:
            await anext(trainer)

    task = asyncio.create_task(step())
    await block.wait()
    if native:
        task.cancel()
    else:
        scope.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    block.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    block.handle.remove()

    assert trainer.step == completed
    assert block.passes == (at if completed == 0 else 16)
    assert sync.versions == []
    assert (tmp_path / "metrics.jsonl").exists() == bool(completed)
    reference = GRPOTrainer(twin, rollouts=make_source(groups), tasks=tasks[:4], config=SMALL)
    assert completed or same(before, weights(model))
    await anext(reference)
    assert not completed or same(weights(twin), weights(model))

    await anext(trainer)
    expected = [f"step-{index:06d}" for index in range(1, completed + 2)]
    assert sync.versions == expected


@pytest.mark.asyncio
async def test_cancelling_during_rollouts_changes_nothing(make_model: Models, tasks: list[Task]) -> None:
    closed: list[bool] = []

    class Never:
        def __call__(self, tasks: Any, /) -> Any:
            return self

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_args: object) -> None:
            closed.append(True)

        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> Group:
            await anyio.sleep_forever()
            raise AssertionError

    model = make_model()
    trainer = GRPOTrainer(model, rollouts=Never(), tasks=tasks, config=CONFIG)
    with anyio.move_on_after(0.05) as scope:
        await anext(trainer)
    assert scope.cancelled_caught
    assert closed == [True]
    assert trainer.step == 0


@pytest.mark.asyncio
async def test_a_mismatch_is_logged(
    make_model: Models, make_sampler: Any, tasks: list[Task], caplog: pytest.LogCaptureFixture
) -> None:
    stale = make_sampler(make_model(seed=5), total)
    trainer = GRPOTrainer(make_model(), rollouts=stale, tasks=tasks, config=CONFIG)
    with caplog.at_level(logging.WARNING, logger="gym_sdk.grpo"):
        step = await anext(trainer)
    assert step.metrics["token_mult_prob_error"] > 1.05
    assert "token_mult_prob_error" in caplog.text


@pytest.mark.asyncio
async def test_a_closed_trainer_takes_no_steps(
    make_model: Models, make_sampler: Any, tasks: list[Task], tmp_path: Path
) -> None:
    model = make_model()
    async with GRPOTrainer(model, rollouts=make_sampler(model, total), tasks=tasks, config=CONFIG) as trainer:
        await anext(trainer)
    for use in (anext(trainer), trainer.save(tmp_path / "c"), trainer.load(tmp_path / "c")):
        with pytest.raises(GymError, match="the trainer is closed"):
            await use


@pytest.mark.asyncio
async def test_weights_of_a_step_that_broke_off_are_pushed_before_the_next_rollouts(
    make_model: Models, make_sampler: Any, tasks: list[Task]
) -> None:
    model, sync, passes = make_model(), Sync(), 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return gradient * float("nan") if passes == 9 else gradient

    model.get_decoder().norm.weight.register_hook(poison)
    source = make_sampler(model, lambda tokens: float(sum(tokens)))
    trainer = GRPOTrainer(model, rollouts=source, tasks=tasks, sync=sync, config=SMALL)
    with pytest.raises(GymError, match="in update 2 of step 1; the update was not applied \\(1 earlier"):
        await anext(trainer)
    assert sync.versions == []
    step = await anext(trainer)
    assert sync.versions == ["step-000000", "step-000001"]
    assert step.metrics["updates"] == 2


@pytest.mark.asyncio
async def test_closing_waits_for_a_step_in_another_task(
    make_model: Models, make_sampler: Any, tasks: list[Task]
) -> None:
    model = make_model()
    twin = make_model()  # the source samples from it, so that only the training thread meets the block
    trainer = GRPOTrainer(model, rollouts=make_sampler(twin, twos), tasks=tasks, config=CONFIG)
    block = Blocked(model, 1)
    running, waiting = asyncio.ensure_future(anext(trainer)), asyncio.ensure_future(anext(trainer))
    await block.wait()
    closing = asyncio.create_task(trainer.aclose())
    await asyncio.sleep(0.02)
    assert not closing.done()
    block.go.set()
    await closing
    assert (await running).index == 1
    with pytest.raises(GymError, match="the trainer is closed"):
        await waiting


@pytest.mark.asyncio
@pytest.mark.parametrize("loss", [LossConfig(), LossConfig.decoupled()])
async def test_a_bandit_is_learned(
    make_model: Models, make_sampler: Any, tasks: list[Task], loss: LossConfig
) -> None:
    torch.manual_seed(0)
    model = make_model()
    source = make_sampler(model, twos, group_size=8)
    config = GRPOConfig(
        optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=8, max_steps=20, loss=loss
    )
    before = await evaluate(source, tasks)
    async with GRPOTrainer(model, rollouts=source, tasks=tasks, config=config) as trainer:
        steps = [step async for step in trainer]
    after = await evaluate(source, tasks)
    assert before.mean_reward is not None
    assert after.mean_reward is not None
    assert before.mean_reward < 0.3
    assert after.mean_reward > 0.8
    assert steps[-1].metrics["entropy"] < steps[0].metrics["entropy"]
    assert all(step.metrics["max_logprob_diff"] <= 1e-4 for step in steps if step.metrics["updates"])
