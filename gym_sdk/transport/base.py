"""The transport protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gym_sdk.schema import Response, ResponseRequest, TokenForm

if TYPE_CHECKING:
    import torch

    from gym_sdk.transport.http import HttpTransport

__all__ = ["ServingTransport", "Transport"]


class Transport(Protocol):
    """Carries requests to one policy. Cancelling a call aborts its generation."""

    async def open(self) -> None:
        """Make ready; called once, in the event loop that uses it."""
        ...

    async def respond(self, request: ResponseRequest, *, token_form: TokenForm = "item") -> Response:
        """Send one request, once.

        Args:
            request: what to send.
            token_form: where the tokens shall stand in the response; a server that knows only one form
                ignores it.

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


@runtime_checkable
class ServingTransport(Protocol):
    """A transport whose policy has an address, or can be given one, so that others can call it too."""

    async def serving(self) -> HttpTransport:
        """Return a transport to the policy's address, which stays open as long as this transport.

        Raises:
            ConfigurationError: this transport is not open.
        """
        ...
