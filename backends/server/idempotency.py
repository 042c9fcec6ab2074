"""`Idempotency-Key`: a model call that is asked for again is answered again, but sampled once.

A client whose connection broke does not know whether its call was answered. It sends the call again under the
same key, and gets the answer that the first one got, or waits for it with the first one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TypeAlias

from aiohttp import web
from prometheus_client import Counter
from pydantic_core import from_json

from backends.server.errors import Handler
from backends.server.operation.metrics import METRICS
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import TOKEN_FORM_HEADER

__all__ = ["FINAL", "KEY_HEADER", "IdempotencyLimits", "add_idempotency", "idempotent"]

KEY_HEADER = "Idempotency-Key"
"""Names a call over all the times that it is sent."""

_REPLAYED_HEADER = "Idempotency-Replayed"
_LONGEST_KEY = 255

FINAL = web.RequestKey("final", bool)
"""Set by a handler whose answer would be the same again. Others, as aborted ones, are not kept."""


@dataclass(frozen=True, slots=True)
class IdempotencyLimits:
    """How much is kept of answers to calls with a key. What goes is sampled again if it is asked for again.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    max_answers: int = 16_384
    """Answers at once; the oldest go first."""
    max_bytes: int = 128 * 2**20
    """How large they are together; an answer that is larger by itself is not kept."""
    ttl_s: float = 600.0
    """How long an answer is kept."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not getattr(self, limit.name) > 0:
                value = getattr(self, limit.name)
                raise ConfigurationError(f"IdempotencyLimits.{limit.name} must be positive, not {value}")


_Place: TypeAlias = tuple[bytes, str]  # who asks, and the key


@dataclass(slots=True, eq=False)
class _Running:
    """A call in flight.

    Attributes:
        digest: of what was asked.
        task: answers it.
        waiters: how many requests wait for it.
    """

    digest: bytes
    task: asyncio.Task[web.StreamResponse]
    waiters: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer that was given.

    Attributes:
        digest: of what was asked.
        body: the answer's.
        content_type: the answer's.
        until: when it goes, by the event loop's clock.
    """

    digest: bytes
    body: bytes
    content_type: str
    until: float


class _Idempotency:
    """The calls with a key: those in flight, and the answers to those that were.

    Args:
        limits: how much is kept.
        repeats: counts the requests that were not sampled for.
    """

    def __init__(self, limits: IdempotencyLimits, repeats: Counter) -> None:
        self._limits = limits
        self._attached = repeats.labels("attached")
        self._replayed = repeats.labels("replayed")
        self._running: dict[_Place, _Running] = {}
        self._kept: OrderedDict[_Place, _Kept] = OrderedDict()
        self._bytes = 0

    async def answer(self, http: web.Request, handler: Handler, key: str) -> web.StreamResponse:
        """Answer a request that has a key.

        Raises:
            PolicyError: the key is none (400), or was used for something else (422).
        """
        if not 0 < len(key) <= _LONGEST_KEY or not key.isascii() or not key.isprintable():
            raise PolicyError(
                f"{KEY_HEADER} must be 1 to {_LONGEST_KEY} printable ASCII characters",
                code="invalid_value",
                param=KEY_HEADER,
            )
        body = await http.read()
        if _asks_for_a_stream(body):
            return await handler(http)  # what was written to one client cannot be written to another
        place, digest = (_caller(http), key), _digest(http, body)
        kept = self._find(place)
        if kept is not None:
            _check_same(kept.digest, digest, key)
            self._replayed.inc()
            return _again(kept.body, kept.content_type)
        running = self._running.get(place)
        if running is None:
            running = self._begin(place, digest, http, handler)
            return await self._wait(place, running)
        _check_same(running.digest, digest, key)
        self._attached.inc()
        answer = await self._wait(place, running)
        assert isinstance(answer, web.Response)
        assert isinstance(answer.body, bytes)
        return _again(answer.body, answer.content_type)

    def _begin(self, place: _Place, digest: bytes, http: web.Request, handler: Handler) -> _Running:
        # a task of its own: the client that asked first may go while others wait
        async def work() -> web.StreamResponse:
            answer = await handler(http)
            if http.get(FINAL) and isinstance(answer, web.Response):
                self._keep(place, digest, answer)
            return answer

        running = self._running[place] = _Running(digest, asyncio.create_task(work()))
        return running

    async def _wait(self, place: _Place, running: _Running) -> web.StreamResponse:
        """Wait for a call in flight; whoever leaves last ends it."""
        running.waiters += 1
        try:
            answer = await asyncio.shield(running.task)
        finally:
            running.waiters -= 1
            if self._running.get(place) is running and (running.task.done() or not running.waiters):
                del self._running[place]  # from now on the key is free, unless the answer is kept
            if not running.waiters and not running.task.done():
                running.task.cancel()
                await asyncio.wait([running.task])
        return answer

    def _find(self, place: _Place) -> _Kept | None:
        kept = self._kept.get(place)
        if kept is not None and kept.until < asyncio.get_running_loop().time():
            self._drop(place)
            return None
        return kept

    def _keep(self, place: _Place, digest: bytes, answer: web.Response) -> None:
        body = answer.body
        if not isinstance(body, bytes) or len(body) > self._limits.max_bytes:
            return
        now = asyncio.get_running_loop().time()
        self._kept[place] = _Kept(digest, body, answer.content_type, now + self._limits.ttl_s)
        self._bytes += len(body)
        oldest = next(iter(self._kept))
        while (
            len(self._kept) > self._limits.max_answers
            or self._bytes > self._limits.max_bytes
            or self._kept[oldest].until < now
        ):
            self._drop(oldest)
            oldest = next(iter(self._kept))

    def _drop(self, place: _Place) -> None:
        self._bytes -= len(self._kept.pop(place).body)


_IDEMPOTENCY = web.AppKey("idempotency", _Idempotency)


def add_idempotency(app: web.Application, limits: IdempotencyLimits | None = None) -> None:
    """Give an application what `idempotent` handlers need.

    Args:
        app: has its metrics already.
        limits: how much is kept.
    """
    repeats = Counter(
        "gym_http_idempotent_repeats",
        "Requests with a known Idempotency-Key, which waited for a call or got its answer again.",
        ["how"],
        registry=app[METRICS].registry,
    )
    app[_IDEMPOTENCY] = _Idempotency(limits or IdempotencyLimits(), repeats)


def idempotent(handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that answers a request with a known `Idempotency-Key` as it answered the first one."""

    async def answer(http: web.Request) -> web.StreamResponse:
        key = http.headers.get(KEY_HEADER)
        if key is None:
            return await handler(http)
        return await http.app[_IDEMPOTENCY].answer(http, handler, key)

    return answer


def _again(body: bytes, content_type: str) -> web.Response:
    return web.Response(body=body, content_type=content_type, headers={_REPLAYED_HEADER: "true"})


def _asks_for_a_stream(body: bytes) -> bool:
    if b'"stream"' not in body:
        return False
    try:
        asked = from_json(body)
    except ValueError:
        return False  # which the handler says better
    return isinstance(asked, dict) and bool(asked.get("stream"))


def _caller(http: web.Request) -> bytes:
    """Return what tells callers apart: nobody gets an answer by guessing somebody else's key."""
    sent = [http.headers.get(name, "") for name in ("Authorization", "x-api-key")]
    return _hash(*(value.encode() for value in sent))


def _digest(http: web.Request, body: bytes) -> bytes:
    form = http.headers.get(TOKEN_FORM_HEADER, "")
    return _hash(http.path.encode(), form.encode(), body)


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _check_same(first: bytes, now: bytes, key: str) -> None:
    if first != now:
        raise PolicyError(
            f"the {KEY_HEADER} {key!r} was used for another request; a new request needs a new key",
            status=422,
            code="idempotency_key_reused",
            param=KEY_HEADER,
        )
