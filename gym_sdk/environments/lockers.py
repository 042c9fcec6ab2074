"""A built-in environment with hidden state: a trail of lockers, each of which can be opened once."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

from gym_sdk.environments.environment import Environment
from gym_sdk.environments.splits import Split, check_split, start_of
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Task
from gym_sdk.verifiers import regex

__all__ = ["Lockers", "lockers", "lockers_tasks"]

_STATE_KEY = "lockers"
_LONGEST = len(string.ascii_lowercase)


class Lockers:
    """The hidden state of one rollout: what is in the lockers, and which of them were opened.

    Args:
        notes: what is in each locker of the trail, by its name.
    """

    def __init__(self, notes: Mapping[str, str]) -> None:
        self._notes = notes
        self._opened: set[str] = set()

    async def open(self, locker: str) -> str:
        """Open a locker and say what is in it: a digit, and the next locker. It locks itself for good.

        Args:
            locker: Its letter.
        """
        if locker in self._opened:
            return "locked"
        self._opened.add(locker)
        return self._notes.get(locker, "empty")


def lockers() -> Environment:
    """Make the environment: lockers of its own for each rollout, and a verifier for `lockers_tasks`.

    The reward is 1 if the final message is exactly `The code is N.` and N are the digits of the whole trail,
    in its order, else 0. Only the lockers tell them, one at a time and once: the policy has to go on to the
    end, and to remember.
    """

    async def setup(task: Task) -> Lockers:
        return Lockers(task.metadata[_STATE_KEY])

    return Environment(
        setup=setup,
        tools=lambda state: [state.open],
        verifier=regex(r"The code is ([0-9]+)\.", fullmatch=True),
    )


def lockers_tasks(
    *, size: int, seed: int, split: Split = "train", min_length: int = 2, max_length: int = 4
) -> list[Task]:
    """Make tasks of following a trail.

    The prompt tells where it begins and nothing else, so there is nothing to learn by heart: a split is other
    draws, and no more.

    Args:
        size: how many tasks.
        seed: different seeds give unrelated tasks.
        split: `train` or `held_out`.
        min_length: lockers of the shortest trail.
        max_length: lockers of the longest trail; at most 26.

    Returns:
        Tasks with the ids `lockers-{split}-{seed}-{i}`; the same arguments give the same tasks.

    Raises:
        ConfigurationError: there is no such split, or the lengths are out of range.
    """
    check_split(split)
    if not 1 <= min_length <= max_length <= _LONGEST:
        raise ConfigurationError(
            f"trails need 1 <= min_length <= max_length <= {_LONGEST}, not {min_length} and {max_length}"
        )
    rng = random.Random(start_of(f"lockers-{split}", seed))
    return [
        _task(f"lockers-{split}-{seed}-{index}", rng, rng.randint(min_length, max_length))
        for index in range(size)
    ]


def _task(task_id: str, rng: random.Random, length: int) -> Task:
    names = rng.sample(string.ascii_lowercase, length)
    digits = rng.choices(string.digits, k=length)
    ends = [*(f"next {name}" for name in names[1:]), "last"]
    notes: dict[str, Any] = {
        name: f"{digit}, {end}" for name, digit, end in zip(names, digits, ends, strict=True)
    }
    return Task(
        f"Follow the lockers from {names[0]}. What is the code?",
        answer="".join(digits),
        id=task_id,
        metadata={"tags": ["lockers"], _STATE_KEY: notes},
    )
