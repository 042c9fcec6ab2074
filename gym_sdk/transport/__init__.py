"""How a request reaches a policy: over HTTP, or in this process."""

from gym_sdk.transport.base import ServingTransport, Transport
from gym_sdk.transport.retry import Retry, with_retries

__all__ = ["Retry", "ServingTransport", "Transport", "with_retries"]
