"""The tasks of `learning.py`, and one training run on one of them, in this process."""

from __future__ import annotations

import asyncio
import functools
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from backends.tiny import RECIPES, cached_tiny_policy
from gym_sdk.client import GymClient
from gym_sdk.environments import (
    Environment,
    arithmetic,
    arithmetic_tasks,
    lockers,
    lockers_tasks,
    spelling,
    spelling_tasks,
)
from gym_sdk.grpo import (
    AlarmConfig,
    EvalResult,
    FolderSync,
    GRPOConfig,
    GRPOTrainer,
    LossConfig,
    OptimizerConfig,
    evaluate,
)
from gym_sdk.launch import launch_server
from gym_sdk.rollout import Limits, Sampling
from gym_sdk.schema import Task
from gym_sdk.tools import Tool, tool

__all__ = ["TASKS", "LearningRun", "LearningTask", "Mode", "train_once"]

Mode = Literal["sync", "async"]

_HELD_OUT_SEED = 1_000_003  # keeps the seeds of training and held-out tasks apart


@dataclass(frozen=True)
class LearningTask:
    """Something to learn.

    Attributes:
        recipe: the policy that starts, by its name in `backends.tiny.RECIPES`.
        environment: makes tools and verifier.
        tasks: makes tasks from `size`, `seed` and `split`.
        max_turns: model calls of a rollout.
        max_output_tokens: of a model call.
        steps: of training.
        tasks_per_step: groups of a step.
        group_size: rollouts of a group.
        learning_rate: its peak.
        tool_latency_s: how long each tool call waits, as calls of a service do.
    """

    recipe: str
    environment: Callable[[], Environment]
    tasks: Callable[..., list[Task]]
    max_turns: int
    max_output_tokens: int
    steps: int = 50
    tasks_per_step: int = 32
    group_size: int = 8
    learning_rate: float = 5e-4
    tool_latency_s: float = 0.0


_LOCKERS = LearningTask("lockers", lockers, lockers_tasks, max_turns=6, max_output_tokens=24, steps=30)

TASKS: dict[str, LearningTask] = {
    "chain_sum": LearningTask(
        "arithmetic",
        arithmetic,
        functools.partial(arithmetic_tasks, "chain_sum"),
        max_turns=4,
        max_output_tokens=96,
    ),
    "lockers": _LOCKERS,
    "lockers_slow": replace(_LOCKERS, tool_latency_s=0.2),
    "spelling": LearningTask("spelling", spelling, spelling_tasks, max_turns=1, max_output_tokens=16),
}
"""What `--tasks` knows. `lockers_slow` is `lockers` with tools that take 200 ms."""


@dataclass(frozen=True)
class LearningRun:
    """What one run is told.

    Attributes:
        task: its name in `TASKS`.
        mode: whether rollouts wait for updates (`sync`), or go on meanwhile.
        seed: of the tasks, the sampling and the trainer. The policy that starts is always the same.
        steps: of training; None for as many as the task says.
        held_out: tasks of each evaluation, one rollout each.
        threads: of torch, here and in the engine's process; None for its own choice.
    """

    task: str
    mode: Mode
    seed: int
    steps: int | None = None
    held_out: int = 256
    threads: int | None = None


def train_once(run: LearningRun) -> dict[str, Any]:
    """Train a tiny policy once; return its numbers. Its memory is that of this process: use a new one."""
    return asyncio.run(_train_once(run))


async def _train_once(run: LearningRun) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    task = TASKS[run.task]
    steps = task.steps if run.steps is None else run.steps
    folder = cached_tiny_policy(RECIPES[task.recipe])
    held_out = task.tasks(size=run.held_out, seed=_HELD_OUT_SEED, split="held_out")
    serving = ["--threads", str(run.threads)] if run.threads is not None else []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        async with (
            launch_server(folder, arguments=serving, log=out / "server.log") as url,
            GymClient(url, model="policy") as client,
        ):
            rollouts = functools.partial(
                client.rollouts,
                environment=_with_latency(task.environment(), task.tool_latency_s),
                sampling=Sampling(temperature=1.0, max_output_tokens=task.max_output_tokens, seed=run.seed),
                limits=Limits(concurrency=256, max_turns=task.max_turns),
            )
            before = await evaluate(functools.partial(rollouts, group_size=1), held_out)
            trainer = GRPOTrainer(
                AutoModelForCausalLM.from_pretrained(str(folder)),
                rollouts=functools.partial(rollouts, group_size=task.group_size),
                tasks=task.tasks(size=steps * task.tasks_per_step, seed=run.seed),
                sync=FolderSync(client, out / "weights"),
                config=_config(run, task, steps),
            )
            async with trainer:
                curve, metrics = await _steps(trainer)
                after = await evaluate(functools.partial(rollouts, group_size=1), held_out)
    return {
        **asdict(run),
        "steps": steps,
        "before": _summary(before),
        "after": _summary(after),
        "curve": curve,
        "seconds": curve[-1]["seconds"] if curve else 0.0,
        "max_logprob_diff": max((step.get("max_logprob_diff", 0.0) for step in metrics), default=0.0),
        "failed_rollouts": sum(step["failed"] for step in metrics),
        "seconds_rollout": sum(step["seconds_rollout"] for step in metrics),
        "seconds_train": sum(step["seconds_train"] for step in metrics),
        "peak_mib": {
            "trainer": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "engine": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        },
    }


def _config(run: LearningRun, task: LearningTask, steps: int) -> GRPOConfig:
    stale = run.mode == "async"
    return GRPOConfig(
        optimizer=OptimizerConfig(learning_rate=task.learning_rate, warmup_steps=5),
        loss=LossConfig.decoupled() if stale else LossConfig(),
        tasks_per_step=task.tasks_per_step,
        # what is certain in the end has no entropy left, and all of these tasks can be learned to the end
        alarms=AlarmConfig(min_entropy=None),
        max_staleness=1 if stale else 0,
        max_steps=steps,
        seed=run.seed,
    )


async def _steps(trainer: GRPOTrainer) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Train to the end; return the curve, with seconds since the start, and all metrics."""
    curve: list[dict[str, float]] = []
    metrics: list[dict[str, float]] = []
    started = time.perf_counter()
    async for step in trainer:
        step.groups.clear()  # what is kept of a step are its numbers
        metrics.append(step.metrics)
        curve.append(
            {
                "step": step.index,
                "reward": step.metrics["reward_mean"],
                "tool_calls": step.metrics["tool_calls_mean"],
                "seconds": time.perf_counter() - started,
            }
        )
    return curve, metrics


def _summary(result: EvalResult) -> dict[str, Any]:
    return {
        "reward": result.mean_reward,
        "standard_error": result.standard_error,
        "outcomes": result.outcomes,
    }


def _with_latency(environment: Environment, seconds: float) -> Environment:
    """Have each tool wait before it answers."""
    if not seconds:
        return environment

    def tools(state: Any) -> Sequence[Tool[..., Any]]:
        return [_delayed(known, seconds) for known in environment.tools_for(state)]

    return Environment(
        tools=tools,
        verifier=environment.verifier,
        setup=environment.setup,
        teardown=environment.teardown,
    )


def _delayed(known: Tool[..., Any], seconds: float) -> Tool[..., Any]:
    @functools.wraps(known)
    async def wait_and_call(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(seconds)
        return await known(*args, **kwargs)

    return tool(wait_and_call)
