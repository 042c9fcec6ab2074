"""Requests in flight: what they have sampled so far, and how they are ended early."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio

from backends.engine import FinishReason, Generation, GenerationChunk, GenerationRequest, TopLogProbs
from backends.sglang.answer import Answer
from backends.sglang.client import SGLangClient
from backends.sglang.weights.adapter import Adapter
from gym_sdk.errors import ConfigurationError, DeadlineError, GymError, PolicyError, TransportError
from gym_sdk.tokens import WeightSpan

__all__ = ["Flight", "Flights", "chunks", "new_chunk"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ARRIVED_S = 0.05
"""How long a request takes to reach SGLang's scheduler. An abort that overtakes it there is lost, and SGLang
forwards only one for each request."""
_AGAIN_S = 0.25
_AFTERWARDS = 4
"""How often a request that nobody waits for is aborted; SGLang also sees that its connection is closed."""


class Flight:
    """One request in flight.

    A stop token of the model that the request does not name ends it in SGLang, but not here: what SGLang
    sampled is then sent again as the prompt of another round.

    Attributes:
        prompt: length P.
        limit: most tokens to generate.
        rid: its name in SGLang, in this round.
        version: what sampled its first tokens, as far as is known.
        epoch: how many updates of the weights had happened when it began.
        adapter: the adapter that samples it, from its first token to its last; None is the base model.
        settled: whether SGLang has said its last word on this round.
        finish_reason: why it ended; None while it runs.
        top_log_probs: the likeliest tokens at the place of each of `token_ids`; None if none were asked for.
        cached_tokens: how many prompt tokens did not need computing; None until SGLang has said so.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: list[int],
        *,
        limit: int,
        version: str,
        epoch: int,
        adapter: Adapter | None = None,
        gated: bool = False,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.limit = limit
        self.version = version
        self.epoch = epoch
        self.adapter = adapter
        self.aborted = False
        self.settled = False
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.spans: list[WeightSpan] = []
        self.top_log_probs: TopLogProbs | None = [] if request.sampling.top_log_probs else None
        self.cached_tokens: int | None = None
        self.rid = ""
        self._since = asyncio.get_running_loop().time()
        self._scope: anyio.CancelScope | None = None
        self._error: GymError | None = None
        self._open = asyncio.Event()
        if not gated:
            self._open.set()

    @property
    def gated(self) -> bool:
        """Whether it arrived during a pause, and therefore has not been sent yet."""
        return not self._open.is_set()

    @property
    def sent(self) -> bool:
        """Whether SGLang may know of it."""
        return bool(self.rid)

    @property
    def age_s(self) -> float:
        """Since when SGLang may be working on this round."""
        return asyncio.get_running_loop().time() - self._since

    def begin_round(self) -> list[int]:
        """Give the round a name that begins no other name, and return its prompt."""
        # SGLang aborts every request whose name begins with the one that is given
        self.rid = f"{self.request.request_id}-{secrets.token_hex(8)}"
        self._since = asyncio.get_running_loop().time()
        self.settled = False
        return self.prompt + self.token_ids

    @property
    def room(self) -> int:
        """How many tokens may still be generated."""
        return self.limit - len(self.token_ids)

    def open(self, version: str, epoch: int, adapter: Adapter | None) -> None:
        """End the wait of a flight that arrived during a pause: these weights sample its first token."""
        self.version, self.epoch, self.adapter = version, epoch, adapter
        self._open.set()

    async def opened(self, within_s: float) -> None:
        """Wait until it may be sent.

        Raises:
            DeadlineError: the pause lasts longer than that.
        """
        if self.gated:
            try:
                async with asyncio.timeout(within_s):
                    await self._open.wait()
            except TimeoutError as error:
                raise DeadlineError("the end of the pause", seconds=within_s) from error

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Note where an error is SGLang's last word: it has refused the round, or given it up."""
        try:
            yield
        except (PolicyError, TransportError) as error:
            self.settled = self.settled or error.status is not None
            raise

    async def wait(self, waiting: Awaitable[_T]) -> _T | None:
        """Wait until SGLang answers; None if `end_here` comes first.

        Raises:
            GymError: what `fail` was given.
        """
        with anyio.CancelScope() as self._scope:
            if self._error is not None:
                self._scope.cancel()
            return await waiting
        if self._error is not None:
            raise self._error
        return None

    def fail(self, error: GymError) -> None:
        """Give up waiting for SGLang, and raise this instead of what it sampled."""
        self._error = error
        if self._scope is not None:
            self._scope.cancel()

    def end_here(self) -> None:
        """Give up waiting for SGLang."""
        self.finish_reason = self.finish_reason or FinishReason.ABORT
        if self._scope is not None:
            self._scope.cancel()

    def add(self, answer: Answer) -> None:
        """Take over a round that SGLang has finished.

        Raises:
            PolicyError: a stop token that the request does not name ended it where its grammar goes on.
        """
        assert answer.finish_reason is not None
        self.settled = True
        start = len(self.token_ids)
        self.token_ids += answer.token_ids
        self.log_probs += answer.log_probs
        if self.top_log_probs is not None:
            self.top_log_probs += answer.top_log_probs or []
        for span in answer.spans or ():
            if span.end > span.start:
                self._append_span(span.version, start + span.start, start + span.end)
        if self.cached_tokens is None:
            self.cached_tokens = answer.cached_tokens
        foreign = answer.stop_id is not None and answer.stop_id not in self.request.sampling.stop_token_ids
        if not foreign:
            self.finish_reason = answer.finish_reason
        elif self.aborted:
            self.finish_reason = FinishReason.ABORT
        elif self.room == 0:
            self.finish_reason = FinishReason.LENGTH
        elif self.request.sampling.grammar is not None:  # another round would begin the grammar anew
            raise PolicyError(
                f"SGLang ended the grammar after {len(self.token_ids)} tokens by the model's stop token "
                f"{answer.stop_id}, which is none of the request's; the grammar must spell one of those",
                code="invalid_value",
                param="grammar",
            )

    def rescored(self, log_probs: list[float], top_log_probs: TopLogProbs | None) -> None:
        """Take over the log-probs that the policy gives the tokens without the request's grammar."""
        self.log_probs, self.top_log_probs = log_probs, top_log_probs

    def abort_unscored(self) -> None:
        """End as aborted before any token: those that were sampled have no log-probs yet."""
        self.finish_reason = FinishReason.ABORT
        self.token_ids, self.log_probs, self.spans = [], [], []
        self.top_log_probs = None if self.top_log_probs is None else []

    def _append_span(self, version: str, start: int, end: int) -> None:
        if self.spans and self.spans[-1].version == version:
            start = self.spans.pop().start
        self.spans.append(WeightSpan(version, start, end))

    def generation(self) -> Generation:
        """Return what was sampled."""
        assert self.finish_reason is not None
        return Generation(
            self.token_ids,
            self.log_probs,
            self.finish_reason,
            tuple(self.spans),
            self.cached_tokens or 0,
            self.top_log_probs,
        )


def chunks(flight: Flight, sent: int) -> Iterator[GenerationChunk]:
    """Yield what a flight has sampled after `sent` tokens, one chunk for each version of the weights."""
    pieces = [(span.version, max(span.start, sent), span.end) for span in flight.spans if span.end > sent]
    if not pieces and flight.finish_reason is not None:
        version = flight.spans[-1].version if flight.spans else flight.version
        pieces = [(version, sent, sent)]
    for number, (version, start, end) in enumerate(pieces, start=1):
        reason = flight.finish_reason if number == len(pieces) else None
        top = flight.top_log_probs
        yield GenerationChunk(
            flight.token_ids[start:end],
            flight.log_probs[start:end],
            version,
            reason,
            top_log_probs=None if top is None else top[start:end],
            cached_tokens=flight.cached_tokens or 0,
        )


def new_chunk(flight: Flight, answer: Answer, start: int) -> GenerationChunk:
    """Return what a round that goes on has sampled after `start` tokens of its own."""
    top = answer.top_log_probs
    return GenerationChunk(
        answer.token_ids[start:],
        answer.log_probs[start:],
        answer.version,
        top_log_probs=None if top is None else top[start:],
        cached_tokens=answer.cached_tokens if flight.cached_tokens is None else flight.cached_tokens,
    )


class Flights:
    """The requests in flight of one engine."""

    def __init__(self, client: SGLangClient) -> None:
        self._client = client
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    def _has(self, flight: Flight) -> bool:
        return self._flights.get(flight.request.request_id) is flight

    def __len__(self) -> int:
        return len(self._flights)

    def add(self, flight: Flight) -> None:
        """Take a flight up.

        Raises:
            ConfigurationError: its request id is in use.
        """
        name = flight.request.request_id
        if name in self._flights:
            raise ConfigurationError(f"request id {name!r} is in use")
        self._flights[name] = flight

    def remove(self, flight: Flight) -> None:
        """Let a flight go; what SGLang still does for it is aborted."""
        del self._flights[flight.request.request_id]
        if flight.sent and not flight.settled:
            self._start(self._abort(flight, flight.rid, _AFTERWARDS))

    def abort(self, request_id: str | None) -> int:
        """Abort one flight, or all; return how many."""
        flights = [flight for flight in self if request_id in (None, flight.request.request_id)]
        for flight in flights:
            flight.aborted = True
            if flight.sent:
                self._start(self._abort(flight, flight.rid, None))
            else:  # an empty name would be the beginning of every name
                flight.end_here()
        return len(flights)

    def fail(self, error: GymError, *, adapted: bool = False) -> None:
        """End all flights, or those on an adapter, by an error."""
        for flight in self:
            if flight.adapter is not None or not adapted:
                flight.fail(error)

    async def ended(self, flights: list[Flight], within_s: float) -> bool:
        """Wait until some flights are gone; return whether they are."""
        until = asyncio.get_running_loop().time() + within_s
        while any(map(self._has, flights)):
            if asyncio.get_running_loop().time() > until:
                return False
            await asyncio.sleep(0.005)
        return True

    async def aclose(self) -> None:
        """Wait for the aborts under way, which are bounded."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, abort: Awaitable[None]) -> None:
        task = asyncio.ensure_future(abort)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abort(self, flight: Flight, rid: str, times: int | None) -> None:
        """Tell SGLang to abort: until the flight is gone, or so many times."""
        until = asyncio.get_running_loop().time() + self._client.config.control_s
        if flight.age_s < _ARRIVED_S:
            await asyncio.sleep(_ARRIVED_S - flight.age_s)
        while self._has(flight) if times is None else times > 0:
            if asyncio.get_running_loop().time() > until:
                flight.end_here()
                return
            times = None if times is None else times - 1
            try:
                await self._client.post("/abort_request", {"rid": rid})
            except GymError as error:
                logger.debug("the abort of %s did not reach SGLang: %s", rid, error)
                return
            await asyncio.sleep(_AGAIN_S)
