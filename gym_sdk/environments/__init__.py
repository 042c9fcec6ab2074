"""Environments: tools, a verifier and per-rollout state; and the tasks to go with them."""

from gym_sdk.environments.arithmetic import arithmetic, arithmetic_tasks, calculator
from gym_sdk.environments.datasets import iter_tasks, load_tasks, save_tasks
from gym_sdk.environments.environment import Environment
from gym_sdk.environments.lockers import lockers, lockers_tasks
from gym_sdk.environments.procedural import reasoning_gym_tasks
from gym_sdk.environments.spelling import spelling, spelling_tasks

__all__ = [
    "Environment",
    "arithmetic",
    "arithmetic_tasks",
    "calculator",
    "iter_tasks",
    "load_tasks",
    "lockers",
    "lockers_tasks",
    "reasoning_gym_tasks",
    "save_tasks",
    "spelling",
    "spelling_tasks",
]
