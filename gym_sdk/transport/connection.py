"""One HTTP/1.1 connection: a request goes out whole, and its answer comes back whole."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, field
from typing import Any

import httptools

from gym_sdk.errors import TransportError
from gym_sdk.transport.pacing import Pacer

__all__ = ["Connection", "HangUpError", "WireAnswer"]

_INFORMATIONAL = range(100, 200)


class HangUpError(ConnectionError):
    """The peer closed the connection.

    Attributes:
        is_answered: whether some of an answer had come.
        after_s: how long after the request was sent, in seconds.
    """

    def __init__(self, message: str, *, is_answered: bool, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.is_answered = is_answered
        self.after_s = after_s


@dataclass(slots=True)
class WireAnswer:
    """An answer. The names of its headers are lower-case; of a header that comes twice, the last counts."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection(asyncio.Protocol):
    """Sends requests one after the other. It belongs to one caller at a time.

    Args:
        what: the address, for messages.
        most_bytes: how large a body may be, decompressed.
        stall_s: how long nothing may come in the middle of an answer, in seconds.
        pacer: hands over the answers.
    """

    __slots__ = (
        "_answer",
        "_bytes",
        "_loop",
        "_most_bytes",
        "_pacer",
        "_parser",
        "_pieces",
        "_sent_at",
        "_stall_s",
        "_stall_timer",
        "_to_the_end",
        "_transport",
        "_waiter",
        "_what",
        "idle_since",
        "is_closed",
        "uses",
    )

    def __init__(self, what: str, *, most_bytes: int, stall_s: float, pacer: Pacer) -> None:
        self._pacer = pacer
        self._what = what
        self._most_bytes = most_bytes
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._waiter: asyncio.Future[WireAnswer] | None = None
        self._answer = WireAnswer()
        self._sent_at = 0.0
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._to_the_end = False  # the body ends where the connection does
        self._stall_timer: asyncio.TimerHandle | None = None
        self.is_closed = False
        self.uses = 0
        self.idle_since = 0.0

    async def exchange(self, request: bytes) -> WireAnswer:
        """Send a request; return its answer. Being cancelled closes the connection.

        Raises:
            HangUpError: the connection was closed, or broke, before all of the answer had come.
            TransportError: the answer stalls, is too large, or is no HTTP.
        """
        if self.is_closed or self._transport is None:
            raise HangUpError("the connection was closed", is_answered=False)
        self.uses += 1
        waiter: asyncio.Future[WireAnswer] = self._loop.create_future()
        self._waiter = waiter
        self._answer = WireAnswer()
        self._bytes = 0
        self._sent_at = self._loop.time()
        try:
            self._transport.write(request)
            return await waiter
        except BaseException:
            self.close()
            raise
        finally:
            self._waiter = None

    def close(self) -> None:
        """Close at once, whatever is under way; without effect if it is closed."""
        self.is_closed = True
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what writes."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Read a piece of an answer."""
        if self._waiter is None or self._waiter.done():
            self.close()  # nobody asked: what it brings belongs to no request
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, zlib.error) as error:
            cause = error.__context__
            if isinstance(cause, TransportError):
                self._fail(cause)
            else:
                text = f"{self._what} answered with something that is no HTTP: {error}"
                self._fail(TransportError(text, retryable=True))
            return
        if self._waiter is not None and not self._waiter.done():
            self._await_more()

    def eof_received(self) -> None:
        """Let the transport close."""
        return None  # closes the transport

    def connection_lost(self, error: Exception | None) -> None:
        """End the answer, or fail it."""
        self.is_closed = True
        self._stop_timer()
        if self._waiter is None or self._waiter.done():
            return
        if self._to_the_end and error is None:
            self._finish()
            return
        answered = self._answer.status != 0
        if answered:
            text = (
                f"{self._what} closed the connection in the middle of its answer, after {self._bytes} bytes"
            )
        else:
            text = f"{self._what} closed the connection without an answer"
        if error is not None:
            text += f" ({type(error).__name__}: {error})"
        self._waiter.set_exception(
            HangUpError(text, is_answered=answered, after_s=self._loop.time() - self._sent_at)
        )

    # httptools' calls

    def on_message_begin(self) -> None:
        """Begin an answer."""
        if self._waiter is None or self._waiter.done():
            self.close()  # a second answer to one request, or its beginning
        self._answer = WireAnswer()
        self._pieces = []
        self._bytes = 0
        self._to_the_end = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note what the head says of the body."""
        answer = self._answer
        answer.status = self._parser.get_status_code()
        headers = answer.headers
        length = headers.get("content-length")
        if length is not None and length.isdigit() and int(length) > self._most_bytes:
            raise self._too_large()
        chunked = "chunked" in headers.get("transfer-encoding", "")
        has_body = answer.status not in (204, 304) and answer.status not in _INFORMATIONAL
        self._to_the_end = has_body and length is None and not chunked

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        self._bytes += len(data)
        if self._bytes > self._most_bytes:
            raise self._too_large()
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        """End the answer."""
        if self._answer.status in _INFORMATIONAL:
            self._answer.status = 0
        elif self._waiter is not None and not self._waiter.done():
            self._finish()

    def _finish(self) -> None:
        answer, waiter = self._answer, self._waiter
        assert waiter is not None
        self._waiter = None  # it has its answer, even if it gets it a little later
        self._stop_timer()
        if not self._parser.should_keep_alive() or self._to_the_end:
            self.close()
        body = b"".join(self._pieces) if len(self._pieces) != 1 else self._pieces[0]
        coding = answer.headers.get("content-encoding", "identity").lower()
        if coding != "identity":
            try:
                body = self._decompressed(body, coding)
            except TransportError as error:
                waiter.set_exception(error)
                return
        answer.body = body
        self._pacer.hand(waiter, answer)

    def _decompressed(self, body: bytes, coding: str) -> bytes:
        """Undo a coding that was not asked for."""
        if coding not in ("gzip", "x-gzip", "deflate"):
            text = f"{self._what} answered in the encoding {coding!r}, which was not asked for"
            raise TransportError(text, retryable=False)
        try:
            inflater = zlib.decompressobj(wbits=47)
            data = inflater.decompress(body, self._most_bytes + 1)
        except zlib.error as error:
            text = f"{self._what} answered with a body that is no {coding}: {error}"
            raise TransportError(text, retryable=True) from error
        if len(data) > self._most_bytes:
            raise self._too_large()
        if not inflater.eof:
            raise TransportError(
                f"{self._what} answered with a {coding} body that was cut off", retryable=True
            )
        return data

    def _too_large(self) -> TransportError:
        return TransportError(
            f"{self._what} answered with more than {self._most_bytes} bytes, the most that is read "
            "(max_answer_bytes)",
            retryable=False,
        )

    def _fail(self, error: Exception) -> None:
        waiter = self._waiter
        self.close()
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def _await_more(self) -> None:
        """Bound the silence in the middle of an answer; before its head, silence is generation."""
        if self._answer.status == 0:
            return
        self._stop_timer()
        self._stall_timer = self._loop.call_later(self._stall_s, self._stalled)

    def _stalled(self) -> None:
        text = (
            f"{self._what} stopped in the middle of its answer: after {self._bytes} bytes, "
            f"nothing for {self._stall_s:g} s"
        )
        self._fail(TransportError(text, retryable=True))

    def _stop_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
