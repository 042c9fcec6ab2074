"""The model calls behind one HTTP request, as tasks, and the newest that is known of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from backends.history import History
from backends.policy import Policy
from backends.snapshots import Snapshot
from gym_sdk.schema import Response, ResponseRequest

__all__ = ["Answerer", "Calls", "PolicyAnswerer"]


class Answerer(Protocol):
    """Makes responses, each in one piece or as snapshots. Leaving early aborts the generation."""

    async def respond(self, request: Any) -> Response:
        """Answer one request."""
        ...

    def stream(self, request: Any) -> AsyncGenerator[Snapshot, None]:
        """Answer one request as it is generated; the last snapshot has the whole response."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyAnswerer:
    """A policy as it answers one client; the fields are arguments of `Policy.respond`."""

    policy: Policy
    scope: str = ""
    inherit: bool = False
    history: History | None = None

    async def respond(self, request: ResponseRequest) -> Response:
        """Answer one request."""
        return await self.policy.respond(
            request, scope=self.scope, inherit=self.inherit, history=self.history
        )

    def stream(self, request: ResponseRequest) -> AsyncGenerator[Snapshot, None]:
        """Answer one request as it is generated."""
        return self.policy.stream(request, scope=self.scope, inherit=self.inherit, history=self.history)


class Calls:
    """One task for each choice of an answer. Close it, and what still runs is aborted.

    Args:
        answerer: what answers.
        requests: one for each choice.
        streams: whether snapshots are wanted.
    """

    def __init__(self, answerer: Answerer, requests: Sequence[Any], *, streams: bool) -> None:
        self._answerer = answerer
        self._begun: dict[int, Response] = {}
        self._newest: dict[int, Snapshot] = {}
        self._news = asyncio.Event()
        self.tasks: list[asyncio.Task[Response]] = [
            asyncio.create_task(self._stream(choice, request) if streams else answerer.respond(request))
            for choice, request in enumerate(requests)
        ]
        for task in self.tasks:
            task.add_done_callback(self._wake)

    @property
    def begun(self) -> list[Response]:
        """The responses of streams as they were when they were accepted."""
        return [response for _, response in sorted(self._begun.items())]

    async def news(self, timeout_s: float) -> list[tuple[int, Snapshot]]:
        """Return the snapshots since the last time, by choice; nothing after a while without any.

        Of several snapshots of a choice there is only the newest, which says all that the others said.

        Raises:
            Exception: what a call failed with.
            asyncio.CancelledError: a call was cancelled.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        news, self._newest = self._newest, {}
        if not news:
            for task in self.tasks:
                if task.done():
                    task.result()
        elif any(_failed(task) for task in self.tasks):
            self._news.set()  # which is told next time
        return sorted(news.items())

    async def results(self) -> list[Response]:
        """Return the responses of all choices; what one fails with ends the others."""
        done, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return [task.result() for task in self.tasks]

    def cancel(self) -> None:
        """Begin to end what nobody waits for any more."""
        for task in self.tasks:
            task.cancel()

    async def aclose(self) -> None:
        """End what nobody waits for any more."""
        self.cancel()
        running = [task for task in self.tasks if not task.done()]
        if running:
            await asyncio.wait(running)

    def _wake(self, task: asyncio.Task[Response]) -> None:
        if not task.cancelled():
            task.exception()  # where several choices fail, one is told, and asyncio would log the others
        self._news.set()

    async def _stream(self, choice: int, request: Any) -> Response:
        async with aclosing(self._answerer.stream(request)) as snapshots:
            async for snapshot in snapshots:
                self._begun.setdefault(choice, snapshot.response)
                self._newest[choice] = snapshot
                self._news.set()
        return snapshot.response


def _failed(task: asyncio.Task[Response]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
