"""Verifiers that misbehave, at the top level of a module: processes import them by name."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from gym_sdk.processes import in_process
from gym_sdk.schema import Rollout


def is_right(rollout: Rollout) -> float:
    return float(rollout.output_text == f"answer {rollout.task.answer}")


def is_bad(rollout: Rollout) -> bool:
    """The verifiers here misbehave for the rollouts of one question."""
    return rollout.task.answer == 7


@in_process(workers=2)
def forks(rollout: Rollout) -> float:
    """Leaves children behind; a forked copy returns from here, too."""
    if is_bad(rollout):
        subprocess.Popen(["sleep", "600"])
        os.fork()
    return is_right(rollout)


@in_process(workers=2, timeout_s=0.5)
def hangs(rollout: Rollout) -> float:
    if is_bad(rollout):
        subprocess.Popen(["sleep", "600"])
        time.sleep(600)
    return is_right(rollout)


@in_process(workers=2)
def exits(rollout: Rollout) -> float:
    if is_bad(rollout):
        sys.exit(3)
    return is_right(rollout)


@in_process(workers=2)
def dies(rollout: Rollout) -> float:
    if is_bad(rollout):
        os._exit(3)
    return is_right(rollout)


@in_process(workers=2)
def raises(rollout: Rollout) -> float:
    if is_bad(rollout):
        raise LookupError("no such answer")
    return is_right(rollout)


@in_process(workers=2)
def right_in_process(rollout: Rollout) -> float:
    return is_right(rollout)


@in_process(workers=2)
def never_done(rollout: Rollout) -> float:
    """Hangs in a child of the worker, too."""
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)
    return 0.0
