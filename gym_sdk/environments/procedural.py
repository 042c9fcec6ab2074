"""Tasks of the reasoning-gym package."""

from __future__ import annotations

from typing import Any

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Task
from gym_sdk.verifiers.procedural import ENTRY_KEY, check_dataset, encode_entry, import_reasoning_gym

__all__ = ["reasoning_gym_tasks"]


def reasoning_gym_tasks(
    name: str, size: int, seed: int, *, instructions: str | None = None, **config: Any
) -> list[Task]:
    """Make tasks of a reasoning-gym dataset, for the verifier `gym_sdk.verifiers.reasoning_gym`.

    The metadata holds the whole entry in a form that survives JSON, and `tags` with the dataset's name.

    Args:
        name: the dataset, e.g. `chain_sum`.
        size: how many tasks.
        seed: most datasets make entry `i` from `seed + i`, so seeds closer than `size` overlap.
        instructions: system text of every task.
        config: the dataset's own parameters.

    Returns:
        Tasks with the ids `{name}-{seed}-{i}`; the same arguments give the same tasks.

    Raises:
        ConfigurationError: reasoning-gym is not installed, has no such dataset, or rejects the parameters.
    """
    package = import_reasoning_gym()
    check_dataset(name)
    if size < 0:
        raise ConfigurationError(f"reasoning-gym dataset {name}: size must not be negative, not {size}")
    try:
        # the size is only what the dataset reports as its length; some refuse 0
        dataset = package.create_dataset(name, size=max(size, 1), seed=seed, **config)
        held_config = encode_entry(config)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(f"reasoning-gym dataset {name}: {error}") from error
    return [_task(name, seed, index, dataset[index], held_config, instructions) for index in range(size)]


def _task(
    name: str, seed: int, index: int, entry: dict[str, Any], config: Any, instructions: str | None
) -> Task:
    try:
        held = {"dataset": name, "config": config, "entry": encode_entry(entry)}
    except TypeError as error:
        raise ConfigurationError(
            f"reasoning-gym dataset {name}: entry {index} cannot be stored: {error}"
        ) from error
    return Task(
        entry["question"],
        answer=entry["answer"],
        id=f"{name}-{seed}-{index}",
        instructions=instructions,
        metadata={"tags": [name], ENTRY_KEY: held},
    )
