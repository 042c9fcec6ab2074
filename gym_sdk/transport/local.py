"""Requests to an engine in this process: no HTTP, no copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from backends.threads import spin_briefly
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Response, ResponseRequest, TokenForm
from gym_sdk.schema.weights import WeightsGroup
from gym_sdk.transport.base import AnyWeights

if TYPE_CHECKING:
    from backends.policy import Policy
    from gym_sdk.transport.http import HttpTransport

__all__ = ["LocalTransport"]


class LocalTransport:
    """Embeds an engine. The model loads in `open`; the tiny policy is made first if it is not cached.

    Args:
        model: folder in the Hugging Face layout, or a name on the hub; None takes the tiny policy.
        name: the model's name in responses.
        progress: told what the tiny policy's making is at, and the share that is done.
        **options: further fields of `backends.loading.PolicyConfig`, e.g. `device`, `dtype`, `rendering`, or
            `backend="sglang"`.
    """

    def __init__(
        self,
        model: str | Path | None,
        *,
        name: str = "policy",
        progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> None:
        self._model = model
        self._name = name
        self._options = options
        self._progress = progress
        self._policy: Policy | None = None
        self._policy_stack = AsyncExitStack()
        self._server: HttpTransport | None = None
        self._server_lock = anyio.Lock()
        self._server_stack = AsyncExitStack()

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
            TransportError: SGLang does not answer.
            DeadlineError: SGLang did not start in time.
        """
        if self._policy is not None:
            return
        spin_briefly()
        try:
            from backends.loading import PolicyConfig, open_policy
            from backends.tiny import cached_tiny_policy
        except ImportError as error:
            raise ConfigurationError(
                f'the embedded engine needs more packages: pip install "gym-sdk[local]" ({error})'
            ) from error

        def configure() -> PolicyConfig:
            folder = self._model or cached_tiny_policy(progress=self._progress)
            try:
                return PolicyConfig(model=str(folder), name=self._name, **self._options)
            except TypeError as error:
                raise ConfigurationError(
                    f"GymClient.local: {error}; see backends.loading.PolicyConfig"
                ) from error

        config = await anyio.to_thread.run_sync(configure)
        self._policy = await self._policy_stack.enter_async_context(open_policy(config))

    async def respond(self, request: ResponseRequest, *, token_form: TokenForm = "item") -> Response:
        """Answer one request; see `Transport.respond`."""
        response = await self.policy.respond(request, inherit=token_form == "compact")
        if token_form == "item" and response.tokens is not None:
            response.output[-1] = response.output[-1].with_tokens(response.tokens)
        return response

    async def update_weights(self, source: AnyWeights, *, version: str) -> None:
        """Load a folder, or copy tensors into the engine; see `Transport.update_weights`."""
        await self.policy.update_weights(source, version=version)

    async def weight_ranks(self) -> int:
        """Ask the engine; see `Transport.weight_ranks`."""
        return await self.policy.weight_ranks()

    async def join_weights_group(self, group: WeightsGroup) -> None:
        """Have the engine join; see `Transport.join_weights_group`."""
        await self.policy.join_weights_group(group)

    async def leave_weights_group(self, name: str) -> None:
        """Have the engine leave; see `Transport.leave_weights_group`."""
        await self.policy.leave_weights_group(name)

    async def serving(self) -> HttpTransport:
        """Serve the policy on a free loopback port, from the first call until `aclose`.

        Raises:
            ConfigurationError: the transport is not open.
        """
        async with self._server_lock:
            if self._server is None:
                self._server = await self._serve(self.policy)
            return self._server

    async def _serve(self, policy: Policy) -> HttpTransport:
        from aiohttp import web

        from backends.server import make_app
        from gym_sdk.transport.http import HttpTransport

        async with AsyncExitStack() as stack:
            # Whoever closes the client does not wait for agents that are still asking.
            runner = web.AppRunner(
                make_app(policy), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
            transport = HttpTransport(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
            await transport.open()
            stack.push_async_callback(transport.aclose)
            self._server_stack = stack.pop_all()
        return transport

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        return self.policy.renderer.decode(token_ids)

    async def aclose(self) -> None:
        """Stop serving and close the engine."""
        self._server = None
        await self._server_stack.aclose()
        self._policy = None
        await self._policy_stack.aclose()
