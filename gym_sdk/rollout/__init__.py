"""One rollout, and many: the agent loop, the stream of groups, what was collected."""

from gym_sdk.rollout.collection import Collection, pass_at_k
from gym_sdk.rollout.config import Deadlines, Limits, Sampling
from gym_sdk.rollout.journal import Journal, read_rollouts
from gym_sdk.rollout.run import RolloutSpec, run_rollout
from gym_sdk.rollout.stream import RolloutStream, StreamOptions, TaskSource
from gym_sdk.transport.retry import Retry

__all__ = [
    "Collection",
    "Deadlines",
    "Journal",
    "Limits",
    "Retry",
    "RolloutSpec",
    "RolloutStream",
    "Sampling",
    "StreamOptions",
    "TaskSource",
    "pass_at_k",
    "read_rollouts",
    "run_rollout",
]
