"""The built-in environment: arithmetic with a calculator, in two families of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from gym_sdk.environments.calculator import CalculationError, evaluate, format_number
from gym_sdk.environments.environment import Environment
from gym_sdk.environments.splits import Split, split_tasks
from gym_sdk.errors import ConfigurationError, ToolError
from gym_sdk.schema import Rollout, Task
from gym_sdk.tools import tool
from gym_sdk.verifiers import reasoning_gym, run_verifier
from gym_sdk.verifiers.procedural import ENTRY_KEY

__all__ = ["FAMILIES", "Family", "arithmetic", "arithmetic_tasks", "calculator"]

Family: TypeAlias = Literal["chain_sum", "basic_arithmetic"]


FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # 23 - 60 + 7
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    # -( 2 + -8 ) * 4
    "basic_arithmetic": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1},
}
"""Parameters of the reasoning-gym datasets."""

_ANSWER = r"\AThe answer is (-?[0-9]+)\.\Z"


@tool
async def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: Numbers, + - * / and brackets.
    """
    try:
        return format_number(evaluate(expression))
    except CalculationError as error:
        raise ToolError(str(error), tool="calculator") from error


def arithmetic(family: Family = "chain_sum") -> Environment:
    """Make the environment: the calculator, and a verifier for the tasks of `arithmetic_tasks`.

    The reward is 1 if the final message is exactly `The answer is N.` and the dataset's scorer gives N full
    marks, else 0.

    Raises:
        ConfigurationError: there is no such family, or reasoning-gym is not installed.
    """
    _parameters(family)
    score = reasoning_gym(family, extract=_ANSWER)

    async def correct(rollout: Rollout) -> float:
        reward = await run_verifier(score, rollout)
        return float(reward.value >= 1.0)

    return Environment(tools=[calculator], verifier=correct)


def arithmetic_tasks(
    family: Family = "chain_sum", *, size: int, seed: int, split: Split = "train", **config: Any
) -> list[Task]:
    """Make arithmetic tasks of one split.

    A hash of the question decides its split, so no question is ever in both, whatever the seeds and sizes.
    Within a split a short question may come up more than once, as often as the dataset makes it.

    Args:
        family: `chain_sum` (2-3 terms, 1-2 digits) or `basic_arithmetic` (2-4 terms of one digit, with
            brackets, signs, products and quotients).
        size: how many tasks.
        seed: different seeds give unrelated tasks.
        split: `train` or `held_out`.
        config: overrides of the dataset's parameters.

    Returns:
        Tasks with the ids `{family}-{split}-{seed}-{i}`; the same arguments give the same tasks.

    Raises:
        ConfigurationError: there is no such family or split, or reasoning-gym is not installed.
    """
    return split_tasks(
        family,
        size=size,
        seed=seed,
        split=split,
        config={**_parameters(family), **config},
        accept=_is_exact,
    )


def _parameters(family: str) -> Mapping[str, Any]:
    if family not in FAMILIES:
        raise ConfigurationError(f"there is no family {family!r}; there are: {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _is_exact(task: Task) -> bool:
    """Whether the answer is what the expression is worth.

    basic_arithmetic divides with `//`; where that rounds, its answer is not the calculator's.
    """
    entry = task.metadata[ENTRY_KEY]["entry"]
    return bool(format_number(evaluate(entry["metadata"]["expression"])) == task.answer)
