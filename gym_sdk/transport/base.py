"""The transport protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from gym_sdk.schema import Response, ResponseRequest, TokenForm
from gym_sdk.schema.weights import AdapterWeights, BroadcastWeights, WeightsGroup

if TYPE_CHECKING:
    import torch

    from gym_sdk.transport.http import HttpTransport

__all__ = ["AnyWeights", "ServingTransport", "Transport"]

AnyWeights: TypeAlias = "str | Path | Mapping[str, torch.Tensor] | BroadcastWeights | AdapterWeights"
"""Where weights come from: a folder, tensors by name, a process group, an adapter's folder."""


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

    async def update_weights(self, source: AnyWeights, *, version: str) -> None:
        """Replace the policy's weights.

        Args:
            source: a folder that the policy's server sees, or tensors by name, or, where the engine is in
                processes of its own, a broadcast or an adapter's folder.
            version: labels the tokens that these weights sample.

        Raises:
            PolicyError: the weights cannot be used; the old ones keep serving.
            TransportError: as for `respond`.
        """
        ...

    async def weight_ranks(self) -> int:
        """Return how many ranks the policy's engine takes in a weights group.

        Raises:
            ConfigurationError: it cannot be in one, and runs in this process.
            PolicyError: it cannot be in one.
            TransportError: as for `respond`.
        """
        ...

    async def join_weights_group(self, group: WeightsGroup) -> None:
        """Have the engine join a group whose rank 0 is listening already; raises as `weight_ranks` does."""
        ...

    async def leave_weights_group(self, name: str) -> None:
        """Have the engine leave a group, if it knows it; raises as `weight_ranks` does."""
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
