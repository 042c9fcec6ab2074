"""One HTTP request for model calls, from its reading to its last token."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from aiohttp import web

from backends.server.calls import Calls
from backends.server.capture import CallRecord, Capture, ended_error
from backends.server.errors import PROBLEM, Problem, problem_of
from backends.server.operation import note
from backends.server.state import STORE, StoredResponse, try_keep
from backends.server.surfaces import Asked
from backends.snapshots import Snapshot
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Response, as_items

__all__ = ["KEEP_ALIVE_S", "Exchange"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

KEEP_ALIVE_S = web.AppKey("keep_alive_s", float)

_REFUSAL_S = 0.02
"""How long a stream waits before it opens: engines refuse requests within it, with an HTTP error."""


class Exchange:
    """What was asked, the calls that answer it, and where both are noted.

    Args:
        http: the request.
        asked: what it asks for.
        calls: what answers it.
        records: of each call.
        capture: what records them, if anything does.
        size: of the request's body, in bytes.
    """

    def __init__(
        self,
        http: web.Request,
        asked: Asked,
        calls: Calls,
        records: Sequence[CallRecord],
        capture: Capture | None,
        size: int,
    ) -> None:
        self.http = http
        self.asked = asked
        self.calls = calls
        self.newest: dict[int, Snapshot] = {}
        self._records = records
        self._capture = capture
        self._size = size
        self._used: Counter[str] = Counter()

    @property
    def keep_alive_s(self) -> float:
        """How often a stream without news says that it is alive."""
        return self.http.app[KEEP_ALIVE_S]

    @property
    def scope(self) -> str:
        """What keeps its state apart: the rollout that it belongs to, if any."""
        return self.http.match_info.get("rollout_id", "")

    @property
    def is_done(self) -> bool:
        """Whether all choices have ended."""
        return len(self.newest) == len(self.calls.tasks) and all(
            snapshot.done for snapshot in self.newest.values()
        )

    async def results(self) -> list[Response]:
        """Wait for the responses of all choices, and note them. Raises what a call fails with."""
        responses = await self._unless_ended(self.calls.results())
        for choice, response in enumerate(responses):
            await self.ended(choice, response)
        return responses

    async def accepted(self) -> None:
        """Wait until all choices are accepted, and a moment more for what engines refuse, which is raised."""
        while len(self.newest) < len(self.calls.tasks):
            await self.look()
        if not any(snapshot.items or snapshot.done for snapshot in self.newest.values()):
            await self.look(_REFUSAL_S)

    async def look(self, timeout_s: float | None = None) -> list[tuple[int, Snapshot]]:
        """Wait for news of the choices, which are noted; nothing if there are none for a while."""
        news = await self._unless_ended(self.calls.news(timeout_s or self.keep_alive_s))
        self.newest |= news
        return news

    async def ended(self, choice: int, response: Response) -> None:
        """Note the end of a choice, and keep the response if it is asked for."""
        self._records[choice].answered(response)
        if response.usage is not None:
            self._used["input_tokens"] += response.usage.input_tokens
            self._used["output_tokens"] += response.usage.output_tokens
            note(self.http, **self._used)
        # what runs in the background is kept by its run
        if self.asked.store and not self.asked.background:
            response.store = await try_keep(self.http.app[STORE], self.stored(response))

    def stored(self, response: Response) -> StoredResponse:
        """Return a response with what is kept of its request."""
        items = as_items(self.asked.requests[0].input)
        return StoredResponse.of(response, items, scope=self.scope, size=self._size)

    def failed(self, error: Exception) -> Problem:
        """Note that a call failed after its answer had begun; return how the client is told."""
        problem = self.http[PROBLEM] = problem_of(error)
        if problem.status >= 500:
            _log.error("a model call failed", exc_info=error)
        for record in self._records:
            if self._capture is not None and self._capture.ended:
                record.cancelled()
            else:
                record.went_wrong(problem)
        return problem

    def abandoned(self) -> None:
        """Note that the client went away; without effect on calls that were over before."""
        for record in self._records:
            record.cancelled()

    async def _unless_ended(self, waiting: Awaitable[_T]) -> _T:
        """Wait for model calls; the end of their capture is an error that the agent reads.

        What a policy refuses is said in the words in which it was asked.
        """
        try:
            return await waiting
        except PolicyError as error:
            raise self.asked.worded(error) from None
        except asyncio.CancelledError:
            task, capture = asyncio.current_task(), self._capture
            if capture is not None and capture.ended and not (task and task.cancelling()):
                raise ended_error() from None
            raise
