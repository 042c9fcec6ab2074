"""SGLang's native HTTP API: one aiohttp session, deadlines, typed errors."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import aiohttp
from pydantic_core import from_json, to_json

from backends.sglang.config import SGLangConfig
from gym_sdk.errors import (
    ConfigurationError,
    ContextOverflowError,
    DeadlineError,
    GymError,
    PolicyError,
    TransportError,
)

__all__ = ["SGLangClient", "UnreachableError", "clean_address", "refusal"]

_RETRYABLE = frozenset({408, 425, 429})
_TOO_LONG = ("maximum allowed length", "longer than the model's context length", "maximum context length")
_BAD_GRAMMAR = (
    "Failed to compile ebnf grammar",
    "Grammar preprocessing timed out",
    "Grammar accept_token failed",  # in the middle of a generation; SGLang calls that an error of its own
)
_FIRST_DELAY_S = 0.1
_LARGE = 2**18
_IDLE_S = 1.0

_T = TypeVar("_T")
_Body: TypeAlias = bytes | Sequence[bytes] | None


class UnreachableError(TransportError):
    """No connection could be made: nothing was sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class SGLangClient:
    """Sends requests to one SGLang server. It belongs to the event loop that made it.

    Args:
        url: the server's root.
        api_key: sent as a bearer token.
        config: deadlines.
        diagnose: says why the server is gone, if the caller knows; added to the errors of lost connections.

    Raises:
        ConfigurationError: `url` is not an HTTP address.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        config: SGLangConfig | None = None,
        diagnose: Callable[[], str | None] | None = None,
    ) -> None:
        self.url = clean_address(url)
        self.config = config or SGLangConfig()
        self._diagnose = diagnose
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            # aiohttp's default of 100 connections would hold back the rest of a large batch; SGLang closes
            # those that are idle for 5 s, and a request that meets the close is lost
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def get(self, path: str) -> dict[str, Any]:
        """Read a JSON object within `control_s`; raises as `post` does."""
        return _object(path, await self._send("GET", path, None, self.config.control_s))

    async def post(
        self, path: str, body: Mapping[str, Any], *, within_s: float | None = None
    ) -> dict[str, Any]:
        """Send a JSON object and read one; an empty answer is an empty object.

        Args:
            path: the route.
            body: what to send.
            within_s: the deadline; `control_s` by default.

        Raises:
            ContextOverflowError: SGLang says that the prompt is too long.
            PolicyError: it refuses the request.
            TransportError: no answer came, or SGLang cannot take the request now.
            DeadlineError: the answer did not come in time.
        """
        data = await self._send("POST", path, to_json(body), within_s or self.config.control_s)
        return _object(path, data) if data.strip() else {}

    async def post_pieces(
        self, path: str, pieces: Sequence[bytes], *, within_s: float | None = None
    ) -> dict[str, Any]:
        """Send a JSON object that is written already, in pieces; raises as `post` does.

        Args:
            path: the route.
            pieces: its text, in UTF-8. A piece should be no larger than what may hold up the event loop.
            within_s: the deadline; `control_s` by default.
        """
        data = await self._send("POST", path, pieces, within_s or self.config.control_s)
        return _object(path, data) if data.strip() else {}

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Send a JSON object and yield the events of the stream that answers; raises as `post` does."""
        until = asyncio.get_running_loop().time() + self.config.generate_s
        answer = await self._until(until, path, self._begin("POST", path, to_json(body)))
        async with answer:
            if answer.status >= 400:
                raise refusal(path, answer.status, await self._until(until, path, self._read(path, answer)))
            buffer = b""
            # not line by line: an event holds all tokens so far, and aiohttp limits a line's length
            while data := await self._until(until, path, self._some(path, answer)):
                *events, buffer = (buffer + data).split(b"\n\n")
                for event in events:
                    text = event.removeprefix(b"data:").strip()
                    if text == b"[DONE]":
                        return
                    yield _object(path, text)
        raise self._lost(path, "the stream ended early")

    async def aclose(self) -> None:
        """Close the session and its connections."""
        await self._session.close()

    async def _send(self, method: str, path: str, body: _Body, within_s: float) -> bytes:
        until = asyncio.get_running_loop().time() + within_s
        async with await self._until(until, path, self._begin(method, path, body), within_s) as answer:
            data = await self._until(until, path, self._read(path, answer), within_s)
        if answer.status >= 400:
            raise refusal(path, answer.status, data)
        return data

    async def _until(
        self, until: float, path: str, waiting: Awaitable[_T], within_s: float | None = None
    ) -> _T:
        """Wait for one thing until the deadline; no timer runs while a stream's reader does other things."""
        try:
            async with asyncio.timeout_at(until) as limit:
                return await waiting
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError(f"SGLang's {path}", seconds=within_s or self.config.generate_s) from error

    async def _begin(self, method: str, path: str, body: _Body) -> aiohttp.ClientResponse:
        """Wait for the answer's head; try again where the connection was refused."""
        for attempt in range(self.config.refused_retries + 1):
            try:
                data, headers = _sendable(body)
                return await self._session.request(method, self.url + path, data=data, headers=headers)
            except aiohttp.ClientConnectorError as error:
                if attempt == self.config.refused_retries:
                    raise self._lost(path, error) from error
                await asyncio.sleep(_FIRST_DELAY_S * 2**attempt)
            except (aiohttp.ClientError, OSError) as error:
                raise self._lost(path, error) from error
            except RuntimeError as error:
                if not self._session.closed:
                    raise
                raise self._lost(path, error) from error
        raise AssertionError("unreachable")

    async def _read(self, path: str, answer: aiohttp.ClientResponse) -> bytes:
        try:
            return await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(path, error) from error

    async def _some(self, path: str, answer: aiohttp.ClientResponse) -> bytes:
        try:
            return await answer.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(path, error) from error

    def _lost(self, path: str, cause: Exception | str) -> GymError:
        if self._session.closed:
            return GymError("the engine is closed")
        what = f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else cause
        why = self._diagnose() if self._diagnose is not None else None
        message = f"no answer from SGLang at {self.url}{path}: {what}" + (f"; {why}" if why else "")
        if isinstance(cause, aiohttp.ClientConnectorError):
            return UnreachableError(message)
        return TransportError(message, retryable=True)


def clean_address(url: str) -> str:
    """Return the root of an SGLang server, without a slash or `/v1` at its end.

    Raises:
        ConfigurationError: it is not an HTTP address.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"SGLang's address must be one such as http://localhost:30000, not {url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def refusal(path: str, status: int, data: bytes | str) -> GymError:
    """Return the error for an answer of status 400 or more."""
    text = _message(data)
    message = f"SGLang's {path} answered {status}: {text}"
    if any(words in text for words in _TOO_LONG):
        return ContextOverflowError(message)
    if any(words in text for words in _BAD_GRAMMAR):
        said = message.partition("\n<state>")[0]  # after it come pages about the matcher
        return PolicyError(said, code="invalid_value", param="grammar")
    if status in _RETRYABLE or status >= 500:
        return TransportError(message, retryable=True, status=status)
    if status in (401, 403, 404):  # of this server's making, so not to be passed on to its clients
        return TransportError(message, retryable=False, status=status)
    return PolicyError(message, status=400)


def _sendable(body: _Body) -> tuple[Any, dict[str, str]]:
    """Return what aiohttp sends, and headers. A large body goes out in pieces: others have turns between."""
    if body is None:
        return None, {}
    if isinstance(body, bytes):
        return io.BytesIO(body) if len(body) > _LARGE else body, {}
    return _each(body), {"Content-Length": str(sum(map(len, body)))}


async def _each(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)  # a write that does not fill the socket does not wait


def _message(data: bytes | str) -> str:
    try:
        body = from_json(data)
    except ValueError:
        body = None
    if isinstance(body, dict):
        error = body.get("error", body)
        message = error.get("message") if isinstance(error, dict) else error
        if message:
            return str(message)
    text = data if isinstance(data, str) else data.decode(errors="replace")
    return text[:500] or "no message"


def _object(path: str, data: bytes) -> dict[str, Any]:
    try:
        body = from_json(data)
    except ValueError as error:
        raise TransportError(
            f"SGLang's {path} answered with no JSON: {data[:200]!r}", retryable=False
        ) from error
    if not isinstance(body, dict):
        raise TransportError(f"SGLang's {path} answered with no object: {data[:200]!r}", retryable=False)
    return body
