"""Connections to a judge's server: open exactly while somebody uses them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from gym_sdk.verifiers.judge.http import JudgeTransport

__all__ = ["Endpoint"]

_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Open:
    """What is open in one event loop."""

    transport: JudgeTransport
    slots: anyio.Semaphore
    users: int = 0


class Endpoint:
    """A server's routes, for any number of event loops.

    A verifier is a plain function: nobody tells it when it is no longer needed, and it may be used in one
    event loop after the other. So connections belong to those who use them right now. The first user in a
    loop opens them, the last one closes them.

    Args:
        base_url: the API's root, ending in `/v1`.
        api_key: sent as a bearer token.
        headers: sent with every request.
        concurrency: requests at once in one event loop.

    Raises:
        ConfigurationError: `base_url` is not an HTTP address.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None, headers: Mapping[str, str], concurrency: int
    ) -> None:
        from gym_sdk.verifiers.judge.http import JudgeTransport

        self._new: Callable[[], JudgeTransport] = lambda: JudgeTransport(
            base_url, api_key=api_key, headers=headers
        )
        self.base_url = self._new().base_url  # also checks it
        self._concurrency = concurrency
        self._open: dict[asyncio.AbstractEventLoop, _Open] = {}

    async def acquire(self) -> None:
        """Become a user, in this event loop."""
        opened = self._opened()
        opened.users += 1
        try:
            await opened.transport.open()
        except BaseException:
            await self.release()
            raise

    async def release(self) -> None:
        """Cease to be one; the last closes the connections, also when its task was cancelled."""
        loop = asyncio.get_running_loop()
        opened = self._open[loop]
        opened.users -= 1
        if opened.users == 0:
            del self._open[loop]
            with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                await opened.transport.aclose()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[JudgeTransport]:
        """Wait for one of the `concurrency` places, and hold it."""
        await self.acquire()
        try:
            opened = self._opened()
            async with opened.slots:
                yield opened.transport
        finally:
            await self.release()

    def _opened(self) -> _Open:
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            self._open[loop] = _Open(self._new(), anyio.Semaphore(self._concurrency))
        return self._open[loop]
