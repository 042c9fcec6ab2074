"""When a request has to be over, and why it was cut."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from aiohttp import web

from gym_sdk.errors import DeadlineError, GymError

__all__ = ["DEADLINE", "Deadline", "deadline_of"]


class Deadline:
    """Cancels the task that it is entered in when its time is up, or when `cut` is called.

    What it cancels for leaves the context as an error. A stream that has begun tells its client itself::

        except asyncio.CancelledError:
            error = deadline_of(request).error
            if error is None:
                raise  # the client went away
            await stream.write(events.failure(problem_of(error)))

    Args:
        seconds: how long the request may take; None is for as long as it wants.
        abort_s: how long it may take to end once it was cut: its client may have stopped to read.
        transport: its connection, which is closed then.
    """

    def __init__(self, seconds: float | None, *, abort_s: float, transport: asyncio.Transport | None) -> None:
        self._seconds = seconds
        self._abort_s = abort_s
        self._transport = transport
        self._scope = asyncio.timeout(seconds)
        self._reason: GymError | None = None
        self._last: asyncio.TimerHandle | None = None

    @property
    def at(self) -> float | None:
        """The event loop's time at which the request has to be over; None if it may take any."""
        return self._scope.when()

    @property
    def error(self) -> GymError | None:
        """Why the request was cut; None if it was not."""
        if not self._scope.expired():
            return None
        return self._reason or DeadlineError("the request", seconds=self._seconds or 0.0)

    def cut(self, reason: GymError) -> None:
        """End the request now, with this error; without effect if it was cut before."""
        if self._reason is None and not self._scope.expired():
            self._reason = reason
            loop = asyncio.get_running_loop()
            self._scope.reschedule(loop.time())
            self._abort_after(0.0)

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        if self._seconds is not None:
            self._abort_after(self._seconds)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._last is not None:
            self._last.cancel()
        try:
            await self._scope.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise self.error or DeadlineError("the request", seconds=self._seconds or 0.0) from None

    def _abort_after(self, seconds: float) -> None:
        """Close the connection if the request is not over some time after it is cut, in so many seconds."""
        if self._last is not None:
            self._last.cancel()
        if self._transport is not None:
            self._last = asyncio.get_running_loop().call_later(seconds + self._abort_s, self._transport.abort)


DEADLINE = web.RequestKey("deadline", Deadline)


def deadline_of(request: web.Request) -> Deadline:
    """Return the deadline of a request; all routes but the public ones have one."""
    return request[DEADLINE]
