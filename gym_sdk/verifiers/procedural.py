"""Verifiers for the tasks of reasoning-gym: each dataset's own scorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers.protocol import Verifier, named
from gym_sdk.verifiers.text import compile_pattern, last_match

__all__ = [
    "ENTRY_KEY",
    "check_dataset",
    "decode_entry",
    "encode_entry",
    "import_reasoning_gym",
    "reasoning_gym",
]

ENTRY_KEY = "reasoning_gym"
"""Where a task's metadata holds `{"dataset", "config", "entry"}`."""

_Score = Callable[[str, dict[str, Any]], float]


def reasoning_gym(dataset: str | None = None, *, extract: str | None = None) -> Verifier:
    r"""Make a verifier: the score that a reasoning-gym dataset gives to the final text.

    For tasks made by `gym_sdk.environments.reasoning_gym_tasks`, whose metadata holds the whole entry.
    Scores are between 0 and 1; many datasets give partial credit.

    Args:
        dataset: the dataset's name; by default each task's own.
        extract: a pattern whose first group (or whole match) is the answer, e.g.
            `r"The answer is (.*)\.$"`. The last match counts; without a match the reward is 0. By default the
            answer is the whole text, without white space around it.

    Raises:
        ConfigurationError: reasoning-gym is not installed, has no such dataset, or the pattern is not valid.
    """
    package = import_reasoning_gym()
    if dataset is not None:
        check_dataset(dataset)
    pattern, group = compile_pattern(extract) if extract is not None else (None, 0)
    scorers: dict[str, _Score] = {}
    name = f"reasoning_gym({dataset or ''})"

    def verify(rollout: Rollout) -> float:
        held = _held(rollout, name)
        if pattern is None:
            answer = rollout.output_text.strip()
        else:
            found = last_match(pattern, rollout.output_text)
            if found is None or found[group] is None:
                return 0.0
            answer = found[group]
        source = dataset or held["dataset"]
        config = held.get("config") or {}
        key = json.dumps([source, config], sort_keys=True)
        if key not in scorers:
            scorers[key] = package.create_dataset(source, **decode_entry(config)).score_answer
        return scorers[key](answer, decode_entry(held["entry"]))

    return named(name, verify)


def _held(rollout: Rollout, name: str) -> Mapping[str, Any]:
    held = rollout.task.metadata.get(ENTRY_KEY)
    if not isinstance(held, Mapping) or not {"dataset", "entry"} <= held.keys():
        raise VerifierError(
            f"verifier {name}: task {rollout.task_id!r} has no reasoning-gym entry in its metadata; make the "
            "tasks with gym_sdk.environments.reasoning_gym_tasks",
            verifier=name,
        )
    return held


def import_reasoning_gym() -> Any:
    """Import the package.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import reasoning_gym as package
    except ImportError as error:
        raise ConfigurationError('reasoning-gym is not installed: pip install "gym-sdk[tasks]"') from error
    return package


def check_dataset(dataset: str) -> None:
    """Check that reasoning-gym knows a dataset.

    Raises:
        ConfigurationError: it does not; lists those that it knows.
    """
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise ConfigurationError(
            f"reasoning-gym has no dataset {dataset!r}; it has: {', '.join(sorted(DATASETS))}"
        )


def encode_entry(value: Any) -> Any:
    """Return a JSON value from which `decode_entry` restores an entry.

    Scorers tell tuples from lists and read dicts by integer keys, which plain JSON loses: a tuple becomes
    `{"$tuple": [...]}`, a dict with other keys than text `{"$dict": [[key, value], ...]}`.

    Raises:
        TypeError: the entry holds something without a JSON form.
    """
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {str(key): encode_entry(entry) for key, entry in value.items()}
        return {"$dict": [[encode_entry(key), encode_entry(entry)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [encode_entry(entry) for entry in value]}
    if isinstance(value, list):
        return [encode_entry(entry) for entry in value]
    if isinstance(value, str):
        return str(value)  # numpy's text is a subclass of Python's
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def decode_entry(value: Any) -> Any:
    """Undo `encode_entry`."""
    if isinstance(value, Mapping):
        if value.keys() == {"$tuple"}:
            return tuple(decode_entry(entry) for entry in value["$tuple"])
        if value.keys() == {"$dict"}:
            return {decode_entry(key): decode_entry(entry) for key, entry in value["$dict"]}
        return {key: decode_entry(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [decode_entry(entry) for entry in value]
    return value
