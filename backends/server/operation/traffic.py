"""The requests in flight: how many there may be, until when, and how they end when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aiohttp import web

from backends.server.errors import BusyError, Handler
from backends.server.operation.config import RequestLimits
from backends.server.operation.deadline import DEADLINE, Deadline
from backends.server.operation.kinds import RouteKind, is_model_call, kind_of, route_of

__all__ = ["TRAFFIC", "Traffic", "admit"]

_CLOSE_S = 1.0
"""How long requests may take to end after their connections were closed."""


class Traffic:
    """What is in flight in one server.

    Args:
        limits: how much there may be.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.model_calls = 0
        self.draining = False
        self._in_flight: set[Deadline] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def check_room(self) -> None:
        """Check that one more model call may begin.

        Raises:
            BusyError: there are as many as there may be (429), or the server is about to stop (503).
        """
        if self.draining:
            raise self._stopping("the server is about to stop and takes no more model calls")
        if self.model_calls >= self.limits.max_concurrent:
            raise BusyError(
                f"{self.model_calls} model calls are in flight, the most that this server takes at once",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=self.limits.retry_after_s,
            )

    @contextmanager
    def passing(self, deadline: Deadline, *, model_call: bool) -> Iterator[None]:
        """Count a request for as long as the context lasts; it can be cut by its deadline."""
        self._in_flight.add(deadline)
        self._idle.clear()
        self.model_calls += model_call
        try:
            yield
        finally:
            self.model_calls -= model_call
            self._in_flight.discard(deadline)
            if not self._in_flight:
                self._idle.set()

    async def drain(self, seconds: float, hurry: asyncio.Event | None = None) -> None:
        """Take no more model calls, let what is in flight finish, and cut what has not by then.

        Args:
            seconds: how long it may take to finish.
            hurry: once this is set, it may not take any longer.
        """
        self.draining = True
        async with asyncio.TaskGroup() as tasks:
            waits = [tasks.create_task(self._idle.wait())]
            if hurry is not None:
                waits.append(tasks.create_task(hurry.wait()))
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        for deadline in list(self._in_flight):
            deadline.cut(self._stopping("the server stopped before this was done"))
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.abort_s + _CLOSE_S):
                await self._idle.wait()

    def _stopping(self, message: str) -> BusyError:
        return BusyError(message, status=503, code="server_stopping", retry_after_s=self.limits.retry_after_s)


TRAFFIC = web.AppKey("traffic", Traffic)


@web.middleware
async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a request in if there is room, and end it in time."""
    if kind_of(route_of(request)) is RouteKind.PUBLIC:
        return await handler(request)
    traffic = request.app[TRAFFIC]
    model_call = is_model_call(request)
    if model_call:
        traffic.check_room()
    limits = traffic.limits
    deadline = request[DEADLINE] = Deadline(
        limits.request_timeout_s if model_call else None,
        abort_s=limits.abort_s,
        transport=request.transport,
    )
    with traffic.passing(deadline, model_call=model_call):
        async with deadline:
            return await handler(request)
