"""One rollout, and many: the agent loop, the stream of groups, what was collected."""

from gym_sdk.metrics import pass_at_k
from gym_sdk.rollout.collection import Collection
from gym_sdk.rollout.config import Deadlines, Limits, Sampling
from gym_sdk.rollout.groups import DynamicSampling
from gym_sdk.rollout.options import StreamOptions
from gym_sdk.rollout.run import run_rollout
from gym_sdk.rollout.signals import SignalStop, stop_on_signals
from gym_sdk.rollout.source import Schedule, TaskSource
from gym_sdk.rollout.spec import RolloutSpec
from gym_sdk.rollout.staleness import Staleness, WeightClock
from gym_sdk.rollout.stream import RolloutStream
from gym_sdk.store import Journal, read_rollouts
from gym_sdk.transport.retry import Retry

__all__ = [
    "Collection",
    "Deadlines",
    "DynamicSampling",
    "Journal",
    "Limits",
    "Retry",
    "RolloutSpec",
    "RolloutStream",
    "Sampling",
    "Schedule",
    "SignalStop",
    "Staleness",
    "StreamOptions",
    "TaskSource",
    "WeightClock",
    "pass_at_k",
    "read_rollouts",
    "run_rollout",
    "stop_on_signals",
]
