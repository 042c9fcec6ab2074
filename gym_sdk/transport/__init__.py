"""How a request reaches a policy: over HTTP, or in this process."""

from gym_sdk.transport.base import AnyWeights, ServingTransport, Transport
from gym_sdk.transport.retry import Retry, with_retries

__all__ = ["AnyWeights", "Retry", "ServingTransport", "Transport", "with_retries"]
