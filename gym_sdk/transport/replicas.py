"""Several replicas of one policy, as far as its weights are concerned: what one is told, all are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from gym_sdk.errors import ConfigurationError, GymError, PolicyError, TransportError
from gym_sdk.schema import Response, ResponseRequest, TokenForm
from gym_sdk.schema.weights import WeightsGroup
from gym_sdk.transport.base import AnyWeights, ServingTransport, Transport
from gym_sdk.transport.replica import name_of

if TYPE_CHECKING:
    from gym_sdk.transport.http import HttpTransport

__all__ = ["Replicas"]

T = TypeVar("T")


class Replicas:
    """Transports to replicas of one policy, as one transport. It closes them.

    Model calls through it go to each in turn, without retries: `Dispatch(replicas.transports)` is for those.

    Args:
        transports: one for each replica.

    Raises:
        ConfigurationError: there is none, or two have the same address.
    """

    def __init__(self, transports: Sequence[Transport]) -> None:
        if not transports:
            raise ConfigurationError("there must be at least one replica")
        self.transports = list(transports)
        self.names = [name_of(transport, index) for index, transport in enumerate(transports)]
        if len(set(self.names)) < len(self.names):
            raise ConfigurationError(f"each replica has an address of its own, not {self.names}")
        self.versions: dict[str, str | None] = {}
        """The weights that each replica got last; None where that is unknown, since an update failed."""
        self._stack = AsyncExitStack()
        self._turn = 0

    async def open(self) -> None:
        """Open all transports, or none."""
        async with AsyncExitStack() as stack:
            for transport in self.transports:
                stack.push_async_callback(transport.aclose)
                await transport.open()
            self._stack = stack.pop_all()

    async def respond(self, request: ResponseRequest, *, token_form: TokenForm = "item") -> Response:
        """Send one request, once, to the replica whose turn it is; see `Transport.respond`."""
        return await self._next().respond(request, token_form=token_form)

    async def update_weights(self, source: AnyWeights, *, version: str) -> None:
        """Replace the weights of all replicas at once; see `Transport.update_weights`.

        If some fail, the others have the new weights, and the error says which; `versions` does, too.
        """

        async def update(transport: Transport, name: str) -> None:
            before = self.versions.get(name)
            self.versions[name] = None
            try:
                await transport.update_weights(source, version=version)
            except PolicyError:
                self.versions[name] = before  # the old ones keep serving
                raise
            self.versions[name] = version

        await self._all(f"got the weights {version!r}", update)

    async def weight_ranks(self) -> int:
        """Return how many ranks all replicas take together; see `Transport.weight_ranks`."""
        return sum(await self._ranks())

    async def join_weights_group(self, group: WeightsGroup) -> None:
        """Have all replicas join, one's ranks after another's; see `Transport.join_weights_group`."""
        first_rank = group.first_rank
        groups: dict[str, WeightsGroup] = {}
        for name, ranks in zip(self.names, await self._ranks(), strict=True):
            groups[name] = replace(group, first_rank=first_rank)
            first_rank += ranks
        if first_rank > group.world_size:
            raise ConfigurationError(
                f"the replicas need the ranks {group.first_rank} to {first_rank - 1}, "
                f"but the group's world_size is {group.world_size}"
            )

        async def join(transport: Transport, name: str) -> None:
            await transport.join_weights_group(groups[name])

        await self._all(f"joined the weights group {group.name!r}", join)

    async def leave_weights_group(self, name: str) -> None:
        """Have all replicas leave; see `Transport.leave_weights_group`."""

        async def leave(transport: Transport, _: str) -> None:
            await transport.leave_weights_group(name)

        await self._all(f"left the weights group {name!r}", leave)

    async def serving(self) -> HttpTransport:
        """Return the transport of the replica whose turn it is; see `ServingTransport`.

        Raises:
            ConfigurationError: its policy has no address, or it is not open.
        """
        transport = self._next()
        if not isinstance(transport, ServingTransport):
            raise ConfigurationError("this replica has no address that others could call")
        return await transport.serving()

    async def aclose(self) -> None:
        """Close all transports; one that fails to keeps no other from closing."""
        await self._stack.aclose()

    def _next(self) -> Transport:
        self._turn = (self._turn + 1) % len(self.transports)
        return self.transports[self._turn]

    async def _ranks(self) -> list[int]:
        async def ask(transport: Transport, _: str) -> int:
            return await transport.weight_ranks()

        return await self._all("said how many ranks it takes", ask)

    async def _all(self, done: str, ask: Callable[[Transport, str], Awaitable[T]]) -> list[T]:
        """Ask all replicas at once, and wait for all of them, also where one fails.

        Raises:
            GymError: one failed: its own error, if there is one replica; else one that names all of them.
        """
        results: dict[str, T] = {}
        failures: dict[str, GymError] = {}

        async def one(transport: Transport, name: str) -> None:
            try:
                results[name] = await ask(transport, name)
            except GymError as error:
                failures[name] = error

        async with asyncio.TaskGroup() as tasks:
            for transport, name in zip(self.transports, self.names, strict=True):
                tasks.create_task(one(transport, name))
        if not failures:
            return [results[name] for name in self.names]
        first = next(iter(failures.values()))
        if len(self.names) == 1:
            raise first
        told = [f"{name} {done}" for name in results]
        told += [f"{name} has not: {error}" for name, error in failures.items()]
        raise _joined("; ".join(told), list(failures.values())) from first


def _joined(message: str, failures: Sequence[GymError]) -> GymError:
    """Return one error for those of several replicas: the worst decides which kind it is."""
    for error in failures:
        if isinstance(error, TransportError):
            retryable = all(not isinstance(other, TransportError) or other.retryable for other in failures)
            return TransportError(message, retryable=retryable, status=error.status)
    first = failures[0]
    if isinstance(first, PolicyError):
        return PolicyError(message, status=first.status, code=first.code, param=first.param)
    return ConfigurationError(message) if isinstance(first, ConfigurationError) else first
