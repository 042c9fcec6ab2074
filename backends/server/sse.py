"""Server-sent events over HTTP."""

from __future__ import annotations

from aiohttp import web

__all__ = ["KEEP_ALIVE", "event_stream"]

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip; it keeps proxies from closing a quiet connection."""


def event_stream() -> web.StreamResponse:
    """Return an answer that events are written to; proxies are asked to pass each on at once."""
    return web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )
