"""How a request reaches a policy: over HTTP, or in this process; at one replica, or at several."""

from gym_sdk.transport.base import AnyWeights, ServingTransport, Transport
from gym_sdk.transport.breaker import Breaker, CircuitState
from gym_sdk.transport.dispatch import Answer, Dispatch
from gym_sdk.transport.replica import ReplicaHealth
from gym_sdk.transport.replicas import Replicas
from gym_sdk.transport.retry import Retry, with_retries

__all__ = [
    "Answer",
    "AnyWeights",
    "Breaker",
    "CircuitState",
    "Dispatch",
    "ReplicaHealth",
    "Replicas",
    "Retry",
    "ServingTransport",
    "Transport",
    "with_retries",
]
