"""Trainers to be killed while they write checkpoints: a process that forks one for each line of its input.

Importing takes most of a trainer's time, and a fork has everything imported already. Each says its process
id, the step that it goes on from, and each step when its checkpoint is written; its parent, when it is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gym_sdk.grpo.checkpoints import CheckpointFolder, read_checkpoint, write_checkpoint
from support.checkpointed import state_at, tiny_model, tiny_optimizer, waiting_group

__all__ = ["open_folder", "score_of", "writers"]


def open_folder(folder: Path | str) -> CheckpointFolder:
    return CheckpointFolder(folder, keep_last=2, keep_best=1)


def score_of(step: int) -> float:
    """What the evaluation of a step says: neither rising nor falling."""
    return float(step * 7 % 11)


def write_for_ever(folder: str, *, until: int | None = None) -> None:
    """Go on from the latest checkpoint; every weight is the step, so a mixture of two would be seen."""
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    with open_folder(folder) as checkpoints:
        step = 0
        if latest := checkpoints.latest():
            checkpoint = read_checkpoint(latest, model, optimizer)
            checkpoint.apply(model, optimizer)
            step = checkpoint.state.step
        os.write(1, b"%d\n" % step)
        while step != until:
            step += 1
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(step)
            for _ in range(2):  # the second replaces the first
                write_checkpoint(
                    checkpoints.path(step),
                    model,
                    state_at(step, score=score_of(step)),
                    optimizer=optimizer,
                    replay={step: [waiting_group(step)]},
                )
            checkpoints.prune()
            os.write(1, b"%d\n" % step)


def main() -> None:
    """Fork a trainer for each folder."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        write_for_ever(folder, until=1)  # imports what is imported late
    os.write(1, b"ready\n")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                os.write(1, b"%d\n" % os.getpid())
                write_for_ever(line.rstrip("\n"))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        os.write(1, b"gone\n")


@contextmanager
def writers() -> Iterator[subprocess.Popen[bytes]]:
    """Start the process; end it in the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-m", "support.checkpoint_writers"],
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
