"""What is noted of each request: an id, a log line, and its part in the metrics."""

from __future__ import annotations

import logging
import re
import time
from typing import Any
from uuid import uuid4

from aiohttp import web

from backends.server.errors import PROBLEM, REQUEST_ID, Handler, is_anthropic
from backends.server.operation.kinds import RouteKind, kind_of, route_of
from backends.server.operation.logs import current_request_id
from backends.server.operation.metrics import METRICS

__all__ = ["mark_answer", "note", "observe"]

_log = logging.getLogger(__name__)

_WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GONE = 499
"""Stands for an answer that nobody waited for."""

_STARTED = web.RequestKey("started", float)
_NOTES: web.RequestKey[dict[str, Any]] = web.RequestKey("notes")
_STREAMS = web.RequestKey("streams", bool)


def note(request: web.Request, **fields: Any) -> None:
    """Add to what the log says of a request when it is over, e.g. how many tokens it took."""
    request[_NOTES].update(fields)


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give a request its id; measure it, count it and log it, however it ends."""
    sent = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = sent if _WELL_FORMED.fullmatch(sent) else f"req_{uuid4().hex}"
    request[_NOTES] = {}
    request[_STARTED] = started = time.perf_counter()
    metrics = request.app[METRICS]
    route = route_of(request)
    token = current_request_id.set(request[REQUEST_ID])
    metrics.in_flight.inc()
    status = _GONE
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        duration_s = time.perf_counter() - started
        metrics.finished(route, request.method, status, duration_s)
        if _STREAMS in request:
            metrics.streams.dec()
        if (problem := request.get(PROBLEM)) is not None:
            metrics.failed(problem)
            note(request, error=problem.code or problem.error)
        if _log.isEnabledFor(_level(route, status)):
            _report(request, route, status, duration_s)
        current_request_id.reset(token)


async def mark_answer(request: web.Request, response: web.StreamResponse) -> None:
    """Put into an answer's head which request it answers, and how long that took."""
    if REQUEST_ID not in request:
        return
    response.headers["x-request-id"] = request[REQUEST_ID]
    if is_anthropic(request.path):
        response.headers["request-id"] = request[REQUEST_ID]
    duration_ms = (time.perf_counter() - request[_STARTED]) * 1000
    response.headers["openai-processing-ms"] = f"{duration_ms:.0f}"
    if not isinstance(response, web.Response):
        request[_STREAMS] = True
        request.app[METRICS].streams.inc()


def _level(route: str, status: int) -> int:
    """Probes come every few seconds, and say nothing unless they fail."""
    return logging.DEBUG if kind_of(route) is RouteKind.PUBLIC and status < 400 else logging.INFO


def _report(request: web.Request, route: str, status: int, duration_s: float) -> None:
    fields = {
        "method": request.method,
        "path": request.path,  # without the query, which may hold what is nobody's business
        "status": status,
        "duration_ms": round(duration_s * 1000, 1),
        "client": request.remote,
    } | request[_NOTES]
    _log.log(
        _level(route, status),
        "%s %r %d in %.0f ms",
        request.method,
        request.path,
        status,
        duration_s * 1000,
        extra={"fields": fields},
    )
