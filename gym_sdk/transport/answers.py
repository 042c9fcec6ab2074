"""HTTP answers: their bodies, and what those say that are no success."""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import aiohttp
from pydantic import ValidationError
from pydantic_core import from_json

from gym_sdk.errors import ContextOverflowError, PolicyError, TokenContractError, TransportError

__all__ = ["read_answer", "read_body", "refusal"]

_T = TypeVar("_T")

_RETRYABLE = frozenset({408, 409, 425, 429})

_MOST_RETRY_AFTER_S = 3600.0


async def read_body(answer: aiohttp.ClientResponse, *, most_bytes: int, stall_s: float) -> bytes:
    """Read a body, of which there has to be news from time to time.

    Args:
        answer: whose head has come.
        most_bytes: how large it may be, decompressed.
        stall_s: how long nothing may come, in seconds.

    Raises:
        TransportError: it is too large, or stalls.
    """
    content = answer.content
    if (answer.content_length or 0) > most_bytes:
        raise _too_large(answer, most_bytes)
    if content.is_eof():  # it came together with the head, as most do
        return await answer.read()
    loop = asyncio.get_running_loop()
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(stall_s) as scope:
            while piece := await content.readany():
                size += len(piece)
                if size > most_bytes:
                    raise _too_large(answer, most_bytes)
                pieces.append(piece)
                scope.reschedule(loop.time() + stall_s)
    except TimeoutError:
        if not scope.expired():
            raise
        message = (
            f"{answer.url} stopped in the middle of its answer: after {size} bytes, nothing for {stall_s:g} s"
        )
        raise TransportError(message, retryable=True) from None
    return b"".join(pieces)


def read_answer(url: str, body: bytes, read: Callable[[bytes], _T]) -> _T:
    """Read the body of a success.

    Args:
        url: who answered, for messages.
        body: what came.
        read: reads a response, or raises a `pydantic.ValidationError`.

    Raises:
        TransportError: it is none; `retryable` if it is no JSON at all, as an answer is that was cut off.
        TokenContractError: its tokens cannot be what was sampled.
    """
    try:
        return read(body)
    except ValidationError as error:
        details = error.errors(include_url=False)
        for detail in details:
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, TokenContractError):
                raise cause from error
        is_cut = details[0]["type"] == "json_invalid"
        wrong = "; ".join(
            f"{'.'.join(map(str, detail['loc'])) or 'body'}: {detail['msg']}" for detail in details[:3]
        )
        raise TransportError(f"{url} answered with no Response: {wrong}", retryable=is_cut) from error


def refusal(url: str, status: int, body: bytes, headers: Mapping[str, str]) -> TransportError | PolicyError:
    """Return the error that an answer stands for which is no success."""
    if status < 400:
        where = headers.get("Location")
        hint = f"; it points to {where}: give the address that answers" if where else ""
        return TransportError(
            f"{url} answered {status}, not with a Response{hint}", retryable=False, status=status
        )
    error = _error_object(body)
    message = error.get("message") or body[:500].decode(errors="replace") or "no message"
    text = f"{url} answered {status}: {message}"
    if status in _RETRYABLE or status >= 500:
        after_s = _retry_after_s(headers.get("Retry-After"), headers.get("Date"))
        return TransportError(text, retryable=True, status=status, retry_after_s=after_s)
    code, param = error.get("code"), error.get("param")
    if code == "context_length_exceeded":
        return ContextOverflowError(str(message), param=param)
    return PolicyError(text, status=status, code=code, param=param)


def _too_large(answer: aiohttp.ClientResponse, most_bytes: int) -> TransportError:
    message = (
        f"{answer.url} answered with more than {most_bytes} bytes, the most that is read (max_answer_bytes)"
    )
    return TransportError(message, retryable=False)


def _error_object(data: bytes) -> dict[str, Any]:
    try:
        body = from_json(data)
    except ValueError:
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}


def _retry_after_s(value: str | None, date: str | None) -> float | None:
    """Read `Retry-After`: seconds, or an HTTP date, of which only the server's own clock can make seconds."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        then, now = _time_of(value), _time_of(date)
        if then is None or now is None:
            return None
        seconds = then - now
    return min(_MOST_RETRY_AFTER_S, max(0.0, seconds))  # NaN becomes 0


def _time_of(date: str | None) -> float | None:
    try:
        return None if date is None else email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
