"""A built-in environment with partial rewards: spelling words backward."""

from __future__ import annotations

from typing import Any

from gym_sdk.environments.environment import Environment
from gym_sdk.environments.splits import Split, split_tasks
from gym_sdk.schema import Task
from gym_sdk.verifiers import reasoning_gym

__all__ = ["spelling", "spelling_tasks"]

_DATASET = "spell_backward"
_CONFIG = {"min_word_len": 3, "max_word_len": 6}


def spelling() -> Environment:
    """Make the environment: no tools, and the verifier for the tasks of `spelling_tasks`.

    The reward is reasoning-gym's own: 1 for the word spelled backward, otherwise the share of its letters
    that stand in their place, upper and lower case being the same.

    Raises:
        ConfigurationError: reasoning-gym is not installed.
    """
    return Environment(verifier=reasoning_gym(_DATASET))


def spelling_tasks(*, size: int, seed: int, split: Split = "train", **config: Any) -> list[Task]:
    """Make tasks of spelling a word of 3 to 6 letters backward, of one split.

    A hash of the word decides its split, so no word is ever in both.

    Args:
        size: how many tasks.
        seed: different seeds give unrelated tasks.
        split: `train` or `held_out`.
        config: overrides of the dataset's parameters.

    Returns:
        Tasks with the ids `spell_backward-{split}-{seed}-{i}`; the same arguments give the same tasks.

    Raises:
        ConfigurationError: there is no such split, or reasoning-gym is not installed.
    """
    return split_tasks(_DATASET, size=size, seed=seed, split=split, config={**_CONFIG, **config})
