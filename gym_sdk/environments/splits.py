"""Splits of generated tasks into those to train on and those held out."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from gym_sdk.environments.procedural import reasoning_gym_tasks
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Task

__all__ = ["Split", "check_split", "split_tasks", "start_of"]

Split: TypeAlias = Literal["train", "held_out"]

_HELD_OUT_SHARE = 4  # one question in four
_MAX_REJECTED = 100  # candidates for each task


def check_split(split: str) -> None:
    """Check a split's name.

    Raises:
        ConfigurationError: there is no such split.
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"there is no split {split!r}; use 'train' or 'held_out'")


def start_of(family: str, seed: int) -> int:
    """Return a large number that neighbouring seeds and other families do not share."""
    return random.Random(f"{family}/{seed}").getrandbits(48)


def split_tasks(
    dataset: str,
    *,
    size: int,
    seed: int,
    split: Split,
    config: Mapping[str, Any],
    accept: Callable[[Task], bool] | None = None,
) -> list[Task]:
    """Make tasks of one split of a reasoning-gym dataset.

    A hash of the question decides its split, so no question is ever in both, whatever the seeds and sizes.
    Within a split a question may come up more than once, as often as the dataset makes it.

    Args:
        dataset: its name.
        size: how many tasks.
        seed: different seeds give unrelated tasks.
        split: `train` or `held_out`.
        config: the dataset's parameters.
        accept: says which tasks may be used at all.

    Returns:
        Tasks with the ids `{dataset}-{split}-{seed}-{i}`; the same arguments give the same tasks.

    Raises:
        ConfigurationError: there is no such split, too few questions are in it, or reasoning-gym is not
            installed or rejects the parameters.
    """
    check_split(split)
    # reasoning-gym makes entry i from seed + i: neighbouring seeds would give nearly the same tasks
    start = first = start_of(dataset, seed)
    tasks: list[Task] = []
    while len(tasks) < size:
        if start - first > _MAX_REJECTED * size + 1_000:
            raise ConfigurationError(
                f"{dataset} with {dict(config)} has too few {split} questions: "
                f"{len(tasks)} in {start - first}"
            )
        batch = reasoning_gym_tasks(dataset, max(64, size), start, **config)
        tasks += [task for task in batch if _belongs(task, split) and (accept is None or accept(task))]
        start += len(batch)
    return [
        dataclasses.replace(task, id=f"{dataset}-{split}-{seed}-{index}")
        for index, task in enumerate(tasks[:size])
    ]


def _belongs(task: Task, split: Split) -> bool:
    digest = hashlib.blake2b(str(task.input).encode(), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0
    return held_out == (split == "held_out")
