"""The transport protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gym_sdk.schema import Response, ResponseRequest

if TYPE_CHECKING:
    import torch

__all__ = ["Transport"]


class Transport(Protocol):
    """Carries requests to one policy. Cancelling a call aborts its generation."""

    async def open(self) -> None:
        """Make ready; called once, in the event loop that uses it."""
        ...

    async def respond(self, request: ResponseRequest) -> Response:
        """Send one request, once.

        Raises:
            TransportError: it did not get there or its answer did not come back; `retryable` says more.
            PolicyError: the policy refused it.
        """
        ...

    async def update_weights(self, source: str | Path | Mapping[str, torch.Tensor], *, version: str) -> None:
        """Replace the policy's weights from a folder, or from tensors where the transport can carry them.

        Raises:
            PolicyError: the weights cannot be used; the old ones keep serving.
            TransportError: as for `respond`.
        """
        ...

    async def aclose(self) -> None:
        """Abort what is in flight and free everything."""
        ...
