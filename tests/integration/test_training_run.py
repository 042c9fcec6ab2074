"""Whole training runs on real parts: an embedded engine, signals, kills."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.held import until
from support.runs import lines, same_tensors, untimed
from support.trainers import EVERY, STEPS, trainers
from transformers import AutoModelForCausalLM

from gym_sdk import GymClient, Limits, Sampling
from gym_sdk.grpo import (
    CheckpointFolder,
    GRPOConfig,
    GRPOTrainer,
    LossConfig,
    OptimizerConfig,
    TensorSync,
    TrainStep,
)
from gym_sdk.grpo.checkpoints import read_state
from gym_sdk.grpo.models import add_lora
from gym_sdk.schema import Rollout, Task
from gym_sdk.transport.local import LocalTransport

TASKS = [Task("Say something. " * (1 + number % 3), id=f"t{number}") for number in range(6)]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def sevenths(rollout: Rollout) -> float:
    """A reward of tokens alone: an untrained policy says nothing that could be judged otherwise."""
    ids = [token for call in rollout.model_calls if call.tokens for token in call.tokens.generation_token_ids]
    return sum(token % 7 == 0 for token in ids) / len(ids)


def model_of(policy: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(policy)


def source(client: GymClient, *, tokens: int = 12, concurrency: int = 64) -> Any:
    return partial(
        client.rollouts,
        verifier=sevenths,
        group_size=3,
        sampling=Sampling(seed=1, max_output_tokens=tokens),
        limits=Limits(concurrency=concurrency),
    )


# in turns


@pytest.mark.asyncio
async def test_one_rollout_at_a_time_makes_a_seeded_run_repeatable_bit_for_bit(
    untrained_policy: Path,
) -> None:
    """With several at once, timing decides which share a forward pass, and so how sums are rounded."""

    async def run(concurrency: int) -> tuple[Any, list[dict[str, float]], list[list[int]]]:
        model = model_of(untrained_policy)
        config = GRPOConfig(optimizer=OPTIMIZER, tasks_per_step=2, max_steps=2)
        async with GymClient.local(untrained_policy) as client:
            rollouts = source(client, tokens=6, concurrency=concurrency)
            async with GRPOTrainer(
                model, rollouts=rollouts, tasks=TASKS, sync=TensorSync(client), config=config
            ) as trainer:
                steps = [step async for step in trainer]
        ids = [row.token_ids for group in steps[0].groups for r in group.rollouts for row in r.sequences()]
        return model.state_dict(), [untimed(step.metrics) for step in steps], ids

    (one, first, tokens), (other, second, _) = await run(1), await run(1)
    assert first == second
    assert same_tensors(one, other)
    assert first[0]["updates"] == 2
    _, _, at_once = await run(64)
    assert at_once == tokens  # what is sampled depends on the seed alone


@pytest.mark.asyncio
async def test_an_adapter_is_served_merged_and_the_engine_agrees_after_each_step(
    untrained_policy: Path,
) -> None:
    torch.manual_seed(0)
    model = add_lora(model_of(untrained_policy), rank=4)
    config = GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=3, max_steps=4)
    async with GymClient.local(untrained_policy) as client:
        async with GRPOTrainer(
            model, rollouts=source(client), tasks=TASKS, sync=TensorSync(client), config=config
        ) as trainer:
            steps = [step async for step in trainer]
    assert [step.metrics["updates"] for step in steps] == [2] * 4
    assert all(step.metrics["max_logprob_diff"] < 1e-4 for step in steps)
    assert [versions(step) for step in steps] == [{"0"}, *({f"step-{made:06d}"} for made in (1, 2, 3))]
    # Training did move the policy: the check compares different weights each time.
    assert all(abs(step.metrics["approx_kl"]) > 1e-4 for step in steps)


def versions(step: TrainStep) -> set[str]:
    return {
        span.version
        for group in step.groups
        for rollout in group.rollouts
        for row in rollout.sequences()
        for span in row.weight_versions
    }


# beside the rollouts


@pytest.mark.asyncio
@pytest.mark.parametrize("staleness", [1, 2])
async def test_an_engine_goes_on_while_its_weights_are_replaced(
    untrained_policy: Path, staleness: int
) -> None:
    config = GRPOConfig(
        optimizer=OptimizerConfig(learning_rate=2e-4),
        loss=LossConfig.decoupled(),
        tasks_per_step=2,
        max_steps=5,
        max_staleness=staleness,
    )
    before = asyncio.all_tasks()
    async with GymClient.local(untrained_policy) as client:
        inside = asyncio.all_tasks()
        async with GRPOTrainer(
            model_of(untrained_policy),
            rollouts=source(client, tokens=40),
            tasks=TASKS,
            sync=TensorSync(client),
            config=config,
        ) as trainer:
            steps = [step async for step in trainer]
        await until(lambda: asyncio.all_tasks() <= inside)
    await until(lambda: asyncio.all_tasks() == before)
    await until(lambda: not any(thread.name.startswith("gym-sdk-train") for thread in threading.enumerate()))
    for step in steps:
        made_by = {int(version.removeprefix("step-")) for version in versions(step)}
        assert step.index - 1 - staleness <= min(made_by) <= max(made_by) <= step.index - 1
        assert step.metrics["unversioned_tokens"] == step.metrics["too_old_tokens"] == 0
        assert step.metrics["staleness_max"] <= staleness
        assert step.metrics["failed"] == step.metrics["cancelled"] == 0
        assert step.metrics.get("max_logprob_diff", 0.0) < 1e-4
    # The bound is a bound: whether a token is as old as it allows is up to when the engine gets to sample it.
    assert max(step.metrics["staleness_max"] for step in steps) >= 1


@pytest.mark.asyncio
async def test_leaving_early_aborts_what_the_engine_does(untrained_policy: Path) -> None:
    config = GRPOConfig(optimizer=OPTIMIZER, tasks_per_step=4, max_staleness=1)
    async with GymClient.local(untrained_policy) as client:
        assert isinstance(client.transport, LocalTransport)
        engine = client.transport.policy.engine
        inside = asyncio.all_tasks()
        async with GRPOTrainer(
            model_of(untrained_policy),
            rollouts=source(client, tokens=400),
            tasks=TASKS,
            sync=TensorSync(client),
            config=config,
        ) as trainer:
            step = asyncio.ensure_future(anext(trainer))
            while not engine.info.running:
                await asyncio.sleep(0.01)
            step.cancel()
            await asyncio.wait([step])
            assert step.cancelled()
            assert engine.info.running  # the rollouts go on: another step may want them
        await until(lambda: asyncio.all_tasks() <= inside)
        await until(lambda: not engine.info.running and not engine.info.waiting)


# signals and kills


class Trainers:
    """Starts runs in a folder, and ends them."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._says = process.stdin, process.stdout
        assert b"ready\n" in iter(self._says.readline, b"")

    def start(self, folder: Path) -> tuple[int, int]:
        """Return the process and the step that it goes on from."""
        self._orders.write(f"{folder}\n".encode())
        return int(self._says.readline()), int(self._says.readline())

    def steps(self, count: int) -> float:
        """Wait until so many steps are complete; return how long one took, in seconds."""
        started = time.perf_counter()
        for _ in range(count):
            assert self._says.readline().strip().isdigit()
        return (time.perf_counter() - started) / max(count, 1)

    def end(self) -> tuple[int, int | None]:
        """Wait for the end; return the exit status, and the last step that was said to be complete."""
        last = None
        for line in iter(self._says.readline, b""):
            if line.startswith(b"ended with "):
                return int(line.removeprefix(b"ended with ")), last
            last = int(line)
        raise AssertionError("the process is gone")


@pytest.fixture(scope="module")
def runs() -> Iterator[Trainers]:
    with trainers() as process:
        yield Trainers(process)


@pytest.fixture(scope="module")
def uninterrupted(runs: Trainers, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert runs.start(folder)[1] == 0
    assert runs.end() == (0, STEPS)
    return lines(folder)


def merged(folder: Path) -> list[dict[str, float]]:
    """Join the numbers of a step and those of its evaluation, where a signal came between them."""
    joined: dict[float, dict[str, float]] = {}
    for line in lines(folder):
        joined.setdefault(line["step"], {}).update(line)
    return list(joined.values())


def latest(folder: Path) -> int:
    path = CheckpointFolder(folder / "checkpoints").latest()
    return 0 if path is None else read_state(path).step


def test_a_run_that_is_terminated_again_and_again_has_the_curve_of_one_that_was_not(
    runs: Trainers, uninterrupted: list[dict[str, float]], tmp_path: Path
) -> None:
    generator, step = random.Random(0), 0
    for count in (1, 0, 3, 2):
        process, resumed = runs.start(tmp_path)
        assert resumed == step
        time.sleep(generator.uniform(0.0, runs.steps(count)))
        sent = time.perf_counter()
        os.kill(process, signal.SIGTERM)
        status, _ = runs.end()
        assert time.perf_counter() - sent < 10
        assert status == 128 + signal.SIGTERM
        step = int(max([line["step"] for line in lines(tmp_path)], default=0))
        assert latest(tmp_path) == step
    assert runs.start(tmp_path)[1] == step
    assert runs.end() == (0, STEPS)
    assert merged(tmp_path) == uninterrupted


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(
    runs: Trainers, uninterrupted: list[dict[str, float]], tmp_path: Path
) -> None:
    generator, step = random.Random(1), 0
    for count in (2, EVERY + 1):  # the first comes before any checkpoint
        process, resumed = runs.start(tmp_path)
        assert resumed == step
        time.sleep(generator.uniform(0.0, runs.steps(count)))
        os.kill(process, signal.SIGKILL)
        assert runs.end()[0] == -signal.SIGKILL
        step = latest(tmp_path)
        assert step >= (resumed + count) // EVERY * EVERY
    assert runs.start(tmp_path)[1] == step
    assert runs.end() == (0, STEPS)
    assert merged(tmp_path) == uninterrupted
