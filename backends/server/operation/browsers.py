"""What browsers ask for: CORS, which is off unless origins are named, and `OPTIONS`.

A page of any site can make a browser send a `POST` to a server on its user's machine. The browser names the
page's site in `Origin`, so where no key protects the server, such requests are refused.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from aiohttp import hdrs, web

from backends.server.errors import Handler
from backends.server.operation.auth import KEYS
from gym_sdk.errors import PolicyError

__all__ = ["ORIGINS", "Origins", "guard_origins", "mark_origin"]

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_EXPOSED = "x-request-id, request-id, openai-processing-ms, retry-after"
_MAX_AGE_S = "600"


class Origins:
    """The origins whose pages may read this server's answers.

    Args:
        origins: such as `https://lab.example`; `*` is every one.
    """

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origin.rstrip("/") for origin in origins)

    def allow(self, origin: str) -> bool:
        """Return whether an origin is one of them."""
        return "*" in self._origins or origin in self._origins


ORIGINS = web.AppKey("origins", Origins)


@web.middleware
async def guard_origins(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer `OPTIONS`, preflights included, and refuse what pages of foreign sites send without a key."""
    unmatched = request.match_info.http_exception
    if request.method == hdrs.METH_OPTIONS and isinstance(unmatched, web.HTTPMethodNotAllowed):
        return _options(request, sorted({*unmatched.allowed_methods, hdrs.METH_OPTIONS}))
    origin = request.headers.get(hdrs.ORIGIN)
    if (
        origin is not None
        and request.method not in _SAFE
        and not request.app[KEYS].needed
        and not request.app[ORIGINS].allow(origin)
        and urlsplit(origin).netloc != request.host
    ):
        raise PolicyError(
            f"pages of {origin} may not call this server from a browser (--cors-origin names those that may)",
            status=403,
            code="origin_not_allowed",
        )
    return await handler(request)


async def mark_origin(request: web.Request, response: web.StreamResponse) -> None:
    """Let pages of allowed origins read an answer, before its head goes out."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and request.app[ORIGINS].allow(origin):
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)


def _options(request: web.Request, methods: list[str]) -> web.Response:
    answer = web.Response(status=204, headers={hdrs.ALLOW: ", ".join(methods)})
    origin = request.headers.get(hdrs.ORIGIN)
    if (
        origin is not None
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        and request.app[ORIGINS].allow(origin)
    ):
        answer.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = ", ".join(methods)
        answer.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = _MAX_AGE_S
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)
        if asked is not None:
            answer.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = asked
    return answer
