"""gym-sdk: rollouts and reinforcement learning of language models over the OpenAI Responses API.

The names below load when they are first used, so that `import gym_sdk` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gym_sdk.client import GymClient as GymClient
    from gym_sdk.errors import GymError as GymError
    from gym_sdk.rollout import Deadlines as Deadlines
    from gym_sdk.rollout import Limits as Limits
    from gym_sdk.rollout import Retry as Retry
    from gym_sdk.rollout import Sampling as Sampling
    from gym_sdk.schema import Group as Group
    from gym_sdk.schema import Outcome as Outcome
    from gym_sdk.schema import Reward as Reward
    from gym_sdk.schema import Rollout as Rollout
    from gym_sdk.schema import Task as Task
    from gym_sdk.tools import Tool as Tool
    from gym_sdk.tools import tool as tool

__version__ = "0.1.0"

_HOMES = {
    "Deadlines": "gym_sdk.rollout",
    "Group": "gym_sdk.schema",
    "GymClient": "gym_sdk.client",
    "GymError": "gym_sdk.errors",
    "Limits": "gym_sdk.rollout",
    "Outcome": "gym_sdk.schema",
    "Retry": "gym_sdk.rollout",
    "Reward": "gym_sdk.schema",
    "Rollout": "gym_sdk.schema",
    "Sampling": "gym_sdk.rollout",
    "Task": "gym_sdk.schema",
    "Tool": "gym_sdk.tools",
    "tool": "gym_sdk.tools",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'gym_sdk' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
