"""Bodies are read before their route is called: whole, not too large, and not too slowly."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from backends.server.errors import Handler
from backends.server.operation.config import RequestLimits
from backends.server.operation.kinds import RouteKind, is_upload, kind_of, route_of
from backends.server.operation.traffic import TRAFFIC
from gym_sdk.errors import PolicyError

__all__ = ["read_bodies"]


@web.middleware
async def read_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Read a request's body, which `request.read()` then returns at once."""
    # a public route has no use for a body, and nobody should be read from without a key
    if request.body_exists and not is_upload(request) and kind_of(route_of(request)) is not RouteKind.PUBLIC:
        limits = request.app[TRAFFIC].limits
        # JSON under any name: curl's -d calls it a form
        if request.content_type.startswith("multipart/"):
            raise PolicyError(
                f"bodies are JSON here, not {request.content_type}",
                status=415,
                code="unsupported_media_type",
            )
        if (request.content_length or 0) > limits.max_body_bytes:
            raise _too_large(limits)
        await _read(request, limits)
    return await handler(request)


async def _read(request: web.Request, limits: RequestLimits) -> None:
    try:
        if request.content.is_eof():  # it came together with the head, as most do
            await request.read()
            return
        async with asyncio.timeout(None) as scope:
            pace = _Pace(request, limits, scope)
            try:
                await request.read()
            finally:
                pace.stop()
    except TimeoutError as error:
        raise PolicyError(
            f"the body came too slowly: fewer than {limits.body_window_bytes} bytes within "
            f"{limits.body_window_s:g} s",
            status=408,
            code="request_timeout",
        ) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise _too_large(limits) from error
    except RequestPayloadError as error:
        raise PolicyError(f"the body is not whole: {error}", code="invalid_body") from error


class _Pace:
    """Ends the reading of a body as soon as a window passes that brings too little of it."""

    def __init__(self, request: web.Request, limits: RequestLimits, scope: asyncio.Timeout) -> None:
        self._content = request.content
        self._limits = limits
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._seen = 0
        self._next = self._loop.call_later(limits.body_window_s, self._check)

    def _check(self) -> None:
        total = self._content.total_bytes
        if total - self._seen < self._limits.body_window_bytes:
            self._scope.reschedule(self._loop.time())
            return
        self._seen = total
        self._next = self._loop.call_later(self._limits.body_window_s, self._check)

    def stop(self) -> None:
        self._next.cancel()


def _too_large(limits: RequestLimits) -> PolicyError:
    return PolicyError(
        f"the body is larger than {limits.max_body_bytes} bytes, the most that this server takes",
        status=413,
        code="request_too_large",
    )
