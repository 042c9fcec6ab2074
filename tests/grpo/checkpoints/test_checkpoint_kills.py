"""A trainer that is killed at any moment while it writes loses no checkpoint that was written before."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from support.checkpoint_writers import open_folder, score_of, writers
from support.checkpointed import tiny_model, tiny_optimizer

from gym_sdk.grpo.checkpoints import read_checkpoint, read_state

KILLS = 20


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """After each kill the latest is whole and not older than what was acknowledged, and the best is kept."""
    generator = random.Random(0)
    with writers() as process:
        assert process.stdout is not None
        assert b"ready\n" in iter(process.stdout.readline, b"")
        step = 0
        for _ in range(KILLS):
            resumed, acknowledged = write_and_kill(process, tmp_path, generator)
            assert resumed == step
            step = check(tmp_path, at_least=acknowledged)
    assert step >= KILLS // 2


def write_and_kill(
    process: subprocess.Popen[bytes], folder: Path, generator: random.Random
) -> tuple[int, int]:
    """Return the step that the trainer went on from, and the last that it acknowledged."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{folder}\n".encode())
    child = int(process.stdout.readline())
    resumed = acknowledged = int(process.stdout.readline())
    started = time.perf_counter()
    if generator.random() < 0.6:
        acknowledged = int(process.stdout.readline())
        time.sleep(generator.uniform(0.0, time.perf_counter() - started))
    else:
        time.sleep(generator.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    for line in iter(process.stdout.readline, b"gone\n"):
        acknowledged = int(line)
    return resumed, acknowledged


def check(folder: Path, *, at_least: int) -> int:
    """Check what the kill left; return the step of the latest checkpoint."""
    with open_folder(folder) as checkpoints:
        latest, best = checkpoints.latest(), checkpoints.best()
        assert not list(folder.glob(".step*"))
    if latest is None:
        assert not at_least
        return 0
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    checkpoint = read_checkpoint(latest, model, optimizer)
    checkpoint.apply(model, optimizer)
    step = checkpoint.state.step
    assert step >= at_least
    assert all((parameter == step).all() for parameter in model.parameters())
    assert [group.task.id for group in checkpoint.replay[step]] == [f"t{step}"]
    assert best is not None
    assert read_state(best).score == max(score_of(number) for number in range(1, step + 1))
    return step
