"""Requests to an engine in this process: no HTTP, no copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from backends.threads import spin_briefly
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Response, ResponseRequest

if TYPE_CHECKING:
    import torch

    from backends.policy import Policy

__all__ = ["LocalTransport"]


class LocalTransport:
    """Embeds an engine. The model loads in `open`; the tiny policy is made first if it is not cached.

    Args:
        model: folder in the Hugging Face layout, or a name on the hub; None takes the tiny policy.
        name: the model's name in responses.
        device: where it runs; a GPU if there is one, by default.
        dtype: number type of the weights, e.g. `bfloat16`.
        context_length: most tokens of prompt and generation; the model's own limit by default.
        progress: told what the tiny policy's making is at, and the share that is done.
    """

    def __init__(
        self,
        model: str | Path | None,
        *,
        name: str = "policy",
        device: str | None = None,
        dtype: str | None = None,
        context_length: int | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self._model = model
        self._name = name
        self._device = device
        self._dtype = dtype
        self._context_length = context_length
        self._progress = progress
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        """The embedded policy.

        Raises:
            ConfigurationError: the transport is not open.
        """
        if self._policy is None:
            raise ConfigurationError("the client is not open; use `async with GymClient.local() as client`")
        return self._policy

    async def open(self) -> None:
        """Load the model.

        Sets `GOMP_SPINCOUNT` for this process unless torch is loaded (see `backends.threads`).

        Raises:
            ConfigurationError: the extra `[local]` is not installed, or the model cannot be loaded.
        """
        if self._policy is not None:
            return
        spin_briefly()
        try:
            from backends.loading import PolicyConfig, load_policy
            from backends.tiny import cached_tiny_policy
        except ImportError as error:
            raise ConfigurationError(
                f'the embedded engine needs more packages: pip install "gym-sdk[local]" ({error})'
            ) from error

        def load() -> Policy:
            folder = self._model or cached_tiny_policy(progress=self._progress)
            return load_policy(
                PolicyConfig(
                    model=str(folder),
                    name=self._name,
                    device=self._device,
                    dtype=self._dtype,
                    context_length=self._context_length,
                )
            )

        self._policy = await anyio.to_thread.run_sync(load)

    async def respond(self, request: ResponseRequest) -> Response:
        """Answer one request; see `Transport.respond`."""
        return await self.policy.respond(request)

    async def update_weights(self, source: str | Path | Mapping[str, torch.Tensor], *, version: str) -> None:
        """Load a folder, or copy tensors into the engine; see `Transport.update_weights`."""
        from backends.engine import FolderWeights, TensorWeights

        if isinstance(source, str | Path):
            await self.policy.update_weights(FolderWeights(Path(source)), version=version)
        else:
            await self.policy.update_weights(TensorWeights(source), version=version)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        return self.policy.renderer.decode(token_ids)

    async def aclose(self) -> None:
        """Close the engine."""
        policy, self._policy = self._policy, None
        if policy is not None:
            await policy.aclose()
