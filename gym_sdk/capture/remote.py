"""Captures over HTTP: begin, read, end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from pydantic import ValidationError

from gym_sdk.capture.calls import CapturePage, RecordedCall
from gym_sdk.errors import DeadlineError, PolicyError, TransportError
from gym_sdk.transport import Retry, with_retries
from gym_sdk.transport.http import HttpTransport

__all__ = ["RemoteCapture"]

_ANSWER_S = 60.0

T = TypeVar("T")


class RemoteCapture:
    """One capture on a server.

    Args:
        rollout_id: names it; nobody else may use it.
        transport: reaches the server.
        retry: how infrastructure failures are tried again.
    """

    def __init__(self, rollout_id: str, transport: HttpTransport, retry: Retry) -> None:
        self.base_url = f"{transport.root_url}/rollouts/{rollout_id}/v1"
        self.records: list[RecordedCall] = []
        self._path = f"/rollouts/{rollout_id}"
        self._transport = transport
        self._retry = retry

    async def begin(self) -> None:
        """Begin the capture.

        Raises:
            TransportError: the server was not reached, or has too many captures.
            PolicyError: the server cannot capture.
        """
        tries = 0

        async def once() -> None:
            nonlocal tries
            tries += 1
            try:
                await self._transport.fetch("POST", self._path)
            except TransportError as error:
                # After a lost answer: the id is unguessable, so the capture is this one.
                if error.status != 409 or tries == 1:
                    raise
            except PolicyError as error:
                if error.status not in (404, 405):
                    raise
                raise PolicyError(
                    f"this server does not capture rollouts; `gym-sdk serve` does ({error})",
                    status=error.status,
                    code=error.code,
                ) from error

        await self._within("the capture's begin", once)

    async def collect(self) -> list[RecordedCall]:
        """End the capture and return its calls; those in flight are aborted.

        Raises:
            TransportError: the server was not reached; the capture may still be there.
            PolicyError: there is no such capture.
        """
        while await self._fetch("GET"):
            pass
        await self._fetch("DELETE")
        return self.records

    async def _fetch(self, method: str) -> bool:
        """Fetch what is new; return whether there is more."""

        async def once() -> CapturePage:
            body = await self._transport.fetch(method, f"{self._path}?after={len(self.records)}")
            try:
                return CapturePage.model_validate_json(body)
            except ValidationError as error:
                raise TransportError(f"the server sent no capture: {error}", retryable=False) from error

        page = await self._within("reading the capture", once)
        self.records += page.calls
        return page.more and bool(page.calls)

    async def _within(self, what: str, once: Callable[[], Awaitable[T]]) -> T:
        with anyio.move_on_after(_ANSWER_S) as scope:
            result, _ = await with_retries(once, self._retry)
            return result
        assert scope.cancelled_caught
        raise DeadlineError(what, seconds=_ANSWER_S)
