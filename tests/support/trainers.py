"""Training runs to be stopped and killed: a process that forks one for each line of its input.

Importing takes most of a short run's time, and a fork has everything imported already. Each says its process
id, the step that it goes on from, and each step when it is complete; its parent, how it ended.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gym_sdk.grpo import CheckpointFolder, Evaluation, GRPOConfig, GRPOTrainer, LossConfig, OptimizerConfig
from gym_sdk.rollout.signals import stop_on_signals
from gym_sdk.schema import Task
from support.checkpointed import tiny_model
from support.served_model import ServedModel

__all__ = ["EVERY", "STEPS", "trainers"]

STEPS = 18
EVERY = 4
"""Steps from one checkpoint to the next."""

CONFIG = GRPOConfig(
    optimizer=OptimizerConfig(learning_rate=1e-2),
    loss=LossConfig(kl_coefficient=0.01),
    tasks_per_step=4,
    max_steps=STEPS,
)


def total(tokens: list[int]) -> float:
    return float(sum(tokens))


async def train(folder: Path, *, warms_up: bool = False) -> int:
    """Train to the end, or until a signal; return the exit status. Warming up, take no step."""
    model = tiny_model(hidden=32, layers=2)
    served = ServedModel(model, total, new_tokens=8)
    tasks = [Task(f"task {number}", id=f"t{number}", metadata={"prompt": number}) for number in range(8)]
    async with stop_on_signals() as stop:
        with CheckpointFolder(folder / "checkpoints", every=EVERY) as checkpoints:
            async with GRPOTrainer(
                model,
                rollouts=served,
                tasks=tasks,
                sync=served,
                config=CONFIG,
                evaluations=[Evaluation(served, tasks[:2], every=5)],
                checkpoints=checkpoints,
                output_dir=folder,
            ) as trainer:
                os.write(1, b"%d\n" % await trainer.resume())
                if warms_up:
                    await trainer.save(folder / "warm")
                    return 0
                async for step in trainer:
                    os.write(1, b"%d\n" % step.index)
    return stop.exit_status


def main() -> None:
    """Fork a run for each folder."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        # Imports what is imported late. A step would start autograd, which does not survive forks.
        asyncio.run(train(Path(folder), warms_up=True))
    os.write(1, b"ready\n")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.write(1, b"%d\n" % os.getpid())
                status = asyncio.run(train(Path(line.rstrip("\n"))))
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, b"ended with %d\n" % status)


@contextmanager
def trainers() -> Iterator[subprocess.Popen[bytes]]:
    """Start the process; end it in the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-m", "support.trainers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        bufsize=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    main()
