"""Training beside the rollouts: how old the data is, weights that arrive in the middle, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.held_source import HeldSource, settle
from support.runs import same_tensors, untimed
from support.served_model import ServedModel
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.grpo import GRPOConfig, GRPOTrainer, LossConfig, OptimizerConfig, TrainStep, evaluate
from gym_sdk.grpo.alarms import AlarmName
from gym_sdk.schema import Task

Models = Callable[..., PreTrainedModel]
OPTIMIZER = OptimizerConfig(learning_rate=5e-3)


def total(tokens: list[int]) -> float:
    """A reward that hardly ever is the same for all of a group."""
    return float(sum(tokens))


def twos(tokens: list[int]) -> float:
    return sum(token == 2 for token in tokens) / len(tokens)


def config(staleness: int = 1, **fields: Any) -> GRPOConfig:
    settings = {"optimizer": OPTIMIZER, "tasks_per_step": 2, "loss": LossConfig.decoupled()}
    return GRPOConfig(max_staleness=staleness, **(settings | fields))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    """No thread of a trainer may be left, in whatever way a run ended."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("gym-sdk-train"):
            thread.join(timeout=5)  # it ends by itself
            assert not thread.is_alive()


@asynccontextmanager
async def no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() == before


def ages(step: TrainStep) -> dict[str, list[int]]:
    """The age of each sampled token, by rollout, in steps that changed the weights: here, every step does."""
    found: dict[str, list[int]] = {}
    for group in step.groups:
        if len(set(group.rewards)) == 1:
            continue
        for rollout in group.rollouts:
            (row,) = rollout.sequences()
            for span in row.weight_versions:
                made_by = int(span.version.removeprefix("step-"))
                found.setdefault(rollout.id, []).extend([step.index - 1 - made_by] * (span.end - span.start))
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize("staleness", [1, 2])
async def test_the_bound_is_kept_and_used(make_model: Models, tasks: list[Task], staleness: int) -> None:
    model = make_model()
    served = ServedModel(model, total)
    async with no_task_left():
        async with GRPOTrainer(
            model, rollouts=served, tasks=tasks, sync=served, config=config(staleness, max_steps=5)
        ) as trainer:
            steps = [step async for step in trainer]
        assert served.opened == served.closed == 1
    assert served.pushed == [f"step-{index:06d}" for index in range(6)]
    # The batch of step s begins when the weights after step s - 1 - staleness serve; it is trained by those
    # after step s - 1.
    expected = [max(0, min(index, staleness)) for index in range(5)]
    assert [max(map(max, ages(step).values())) for step in steps] == expected
    for step, oldest in zip(steps, expected, strict=True):
        flat = [age for row in ages(step).values() for age in row]
        assert step.metrics["staleness_max"] == oldest
        assert step.metrics["staleness_mean"] == pytest.approx(sum(flat) / len(flat))
        assert step.metrics["stale_tokens_share"] == sum(age > 0 for age in flat) / len(flat)
        assert step.metrics["trained_tokens"] == len(flat)
        assert step.metrics["unversioned_tokens"] == step.metrics["too_old_tokens"] == 0
        if oldest == 0:
            assert step.metrics["max_logprob_diff"] < 1e-4
        else:
            assert "max_logprob_diff" not in step.metrics  # there is no token of the present weights
            assert step.metrics["stale_ratio_max"] > 1.001  # but older ones, and training did something


@pytest.mark.asyncio
@pytest.mark.parametrize("staleness", [1, 2])
async def test_rollouts_that_go_on_through_an_update_are_trained(
    make_model: Models, tasks: list[Task], staleness: int
) -> None:
    model = make_model()
    # The first group of each batch but the first waits for new weights.
    served = ServedModel(model, total, spans=lambda number: number >= 2 and number % 2 == 0)
    async with no_task_left():
        async with GRPOTrainer(
            model, rollouts=served, tasks=tasks, sync=served, config=config(staleness, max_steps=4)
        ) as trainer:
            steps = [step async for step in trainer]
    spanning = [sum(len(set(row)) > 1 for row in ages(step).values()) for step in steps]
    assert spanning == [0, 4, 4, 4]
    for step, count in zip(steps, spanning, strict=True):
        assert step.metrics["rollouts_spanning_versions"] == count
        assert step.metrics["staleness_max"] <= staleness
        assert step.metrics["updates"] == 2
        # The tokens of the present weights agree with the trainer, also in the middle of a rollout.
        if 0 in {age for row in ages(step).values() for age in row}:
            assert step.metrics["max_logprob_diff"] < 1e-4
    assert any("max_logprob_diff" in step.metrics for step in steps[1:])


@pytest.mark.asyncio
async def test_the_same_tasks_are_trained_on_in_the_same_order_as_in_turns(
    make_model: Models, tasks: list[Task]
) -> None:
    orders = []
    for staleness in (0, 2):
        model = make_model()
        served = ServedModel(model, total)
        async with GRPOTrainer(
            model, rollouts=served, tasks=tasks, sync=served, config=config(staleness, max_steps=6)
        ) as trainer:
            steps = [step async for step in trainer]
        orders.append([[(group.task.id, group.epoch) for group in step.groups] for step in steps])
    assert orders[0] == orders[1]
    assert {epoch for step in orders[0] for _, epoch in step} == {0, 1}


@pytest.mark.asyncio
async def test_tokens_of_an_engine_that_was_not_updated_are_left_out(
    make_model: Models, tasks: list[Task]
) -> None:
    class Deaf(ServedModel):
        """Says that it has new weights, and goes on with the first ones."""

        async def push(self, model: Any, *, version: str) -> None:
            if not self.pushed:
                await super().push(model, version=version)

    model = make_model()
    served = Deaf(model, total)
    async with GRPOTrainer(
        model, rollouts=served, tasks=tasks, sync=served, config=config(1, max_steps=4)
    ) as trainer:
        steps = [step async for step in trainer]
    assert [step.metrics["updates"] for step in steps] == [2, 2, 0, 0]
    assert [step.metrics["too_old_tokens"] for step in steps[:2]] == [0, 0]
    assert all(step.metrics["too_old_tokens"] == sum(map(len, ages(step).values())) for step in steps[2:])
    [alarm] = [alarm for step in steps for alarm in step.alarms if alarm.name is AlarmName.STALE]
    assert (alarm.step, alarm.value) == (3, steps[2].metrics["too_old_tokens"])
    assert "does the engine take the weights that are pushed" in alarm.message


@pytest.mark.asyncio
async def test_a_bandit_is_learned_from_stale_data(make_model: Models, tasks: list[Task]) -> None:
    model = make_model()
    served = ServedModel(model, twos, group_size=8)
    before = await evaluate(served, tasks)
    async with GRPOTrainer(
        model, rollouts=served, tasks=tasks, sync=served, config=config(2, tasks_per_step=4, max_steps=25)
    ) as trainer:
        async for _ in trainer:
            pass
        after = await evaluate(served, tasks)
    assert before.mean_reward is not None
    assert after.mean_reward is not None
    assert before.mean_reward < 0.3
    assert after.mean_reward > 0.8


# how it ends


class Left(Exception):
    pass


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["break", "error", "cancelled", "anyio"])
async def test_leaving_ends_the_rollouts_under_way(make_model: Models, tasks: list[Task], how: str) -> None:
    model = make_model()
    served = ServedModel(model, total, spans=lambda number: number >= 4)  # those do not end by themselves
    scope = anyio.CancelScope()

    async def train() -> None:
        with scope:
            async with GRPOTrainer(
                model, rollouts=served, tasks=tasks, sync=served, config=config(2)
            ) as trainer:
                async for _ in trainer:
                    if how == "break":
                        break
                    if how == "error":
                        raise Left
                    if how == "anyio":
                        scope.cancel()
                    else:
                        training.cancel()

    async with no_task_left():
        training = asyncio.create_task(train())
        async with asyncio.timeout(10):
            await asyncio.wait([training])
        assert training.cancelled() == (how == "cancelled")
        if how == "error":
            assert isinstance(training.exception(), Left)
        assert served.opened == served.closed == 1


async def begun_and_left(trainer: GRPOTrainer) -> asyncio.Future[TrainStep]:
    step = asyncio.ensure_future(anext(trainer))
    await settle()
    step.cancel()
    await asyncio.wait([step])
    return step


@pytest.mark.asyncio
async def test_a_step_that_waits_for_rollouts_can_be_cancelled_and_taken_up_again(
    make_model: Models, tasks: list[Task]
) -> None:
    model, source = make_model(), HeldSource()
    served = ServedModel(model, total)
    async with no_task_left():
        async with GRPOTrainer(model, rollouts=source, tasks=tasks, sync=served, config=config()) as trainer:
            step = await begun_and_left(trainer)
            assert step.cancelled()
            assert (trainer.step, len(source.begun), source.closed) == (0, 4, 0)
            step = asyncio.ensure_future(anext(trainer))
            await settle()
            source.end(TransportError("gone", retryable=True))
            with pytest.raises(TransportError, match="gone"):
                await step
            assert (trainer.step, source.opened, source.closed) == (0, 1, 1)
            await begun_and_left(trainer)
            assert (source.opened, len(source.begun)) == (2, 8)
        assert source.closed == 2


@pytest.mark.asyncio
async def test_it_needs_weights_of_its_own_and_an_end(make_model: Models, tasks: list[Task]) -> None:
    model = make_model()
    served = ServedModel(model, total)
    with pytest.raises(ConfigurationError, match=r"max_staleness.*pass sync=, or set max_staleness=0"):
        GRPOTrainer(model, rollouts=served, tasks=tasks, config=config())
    trainer = GRPOTrainer(model, rollouts=served, tasks=tasks, sync=served, config=config())
    with pytest.raises(ConfigurationError, match="use `async with`"):
        await anext(trainer)
    assert served.opened == 0


# in turns


@pytest.mark.asyncio
@pytest.mark.parametrize("packed", [True, False])
async def test_one_seed_gives_one_run_bit_for_bit(
    make_model: Models, make_sampler: Any, tasks: list[Task], tmp_path: Path, packed: bool
) -> None:
    async def run() -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        torch.manual_seed(5)
        model = make_model()
        settings = GRPOConfig(optimizer=OPTIMIZER, tasks_per_step=4, max_steps=3, pack=packed)
        async with GRPOTrainer(
            model, rollouts=make_sampler(model, total), tasks=tasks, config=settings
        ) as trainer:
            numbers = [untimed(step.metrics) async for step in trainer]
        return model.state_dict(), numbers

    (one, first), (other, second) = await run(), await run()
    assert first == second
    assert same_tensors(one, other)
