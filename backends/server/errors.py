"""Errors in the shape of the API that was called, OpenAI's or Anthropic's, with the right status."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails, to_json

from gym_sdk.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineError,
    GymError,
    PolicyError,
    TokenContractError,
    TransportError,
)
from gym_sdk.schema import TOKEN_FIELDS

__all__ = [
    "PROBLEM",
    "REQUEST_ID",
    "BusyError",
    "Handler",
    "Problem",
    "error_body",
    "error_middleware",
    "is_anthropic",
    "json_response",
    "problem_of",
    "validation_error",
]

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)
"""The id of a request, which its answer carries, too."""

_KINDS = {404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_PATH = re.compile(r"(/rollouts/[^/]+)?/v1/messages(/.*)?")
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class BusyError(PolicyError):
    """The server has no room now; the same request may succeed later.

    Attributes:
        retry_after_s: after how long the client should try again.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after_s: float) -> None:
        super().__init__(message, status=status, code=code)
        self.retry_after_s = retry_after_s


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """Return JSON, written by pydantic's serializer."""
    return web.Response(body=to_json(body), status=status, content_type="application/json")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request has no answer.

    Attributes:
        error: the class name of the error.
        status: the HTTP status.
        message: what was wrong, where, and what to do.
        kind: the error object's `type`.
        param: the request field at fault.
        code: OpenAI's error code.
        headers: what the answer's head says about it.
    """

    error: str
    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """Return OpenAI's error object: `{"message", "type", "param", "code"}`."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def to_anthropic(self) -> dict[str, Any]:
        """Return Anthropic's error object: `{"type", "message"}`; it has no place for `param` and `code`."""
        other = "api_error" if self.status >= 500 else "invalid_request_error"
        return {"type": _ANTHROPIC_KINDS.get(self.status, other), "message": self.message}


PROBLEM = web.RequestKey("problem", Problem)
"""What went wrong with a request, for its log line and the metrics. Streams that fail set it, too."""


def problem_of(error: Exception) -> Problem:
    """Return what to answer for an error."""
    name = type(error).__name__
    match error:
        case PolicyError():
            kind = _KINDS.get(error.status, "invalid_request_error")
            if error.status >= 500:
                kind = "server_error"
            return Problem(name, error.status, str(error), kind, error.param, error.code, _headers(error))
        case ValidationError():
            return problem_of(validation_error(error))
        case CheckpointError() | ConfigurationError() | TokenContractError():
            return Problem(name, 400, str(error))
        case TransportError():  # an engine in another process does not answer
            return Problem(name, 503 if error.retryable else 502, str(error), "server_error")
        case DeadlineError():
            return Problem(name, 504, str(error), "server_error")
        case web.HTTPException():
            headers = {key: error.headers[key] for key in ("Allow",) if key in error.headers}
            return Problem(name, error.status, error.reason, headers=headers)
    return Problem(name, 500, f"{name}: {error}", "server_error")


def validation_error(error: ValidationError) -> PolicyError:
    """Turn a body that does not fit the schema into an error that names the field."""
    detail = max(error.errors(include_url=False), key=lambda entry: len(entry["loc"]))
    param = _param(detail)
    cause = detail.get("ctx", {}).get("error")
    message = str(cause) if isinstance(cause, GymError) else detail["msg"]
    return PolicyError(f"{param or 'body'}: {message}", code="invalid_value", param=param)


def _param(detail: ErrorDetails) -> str | None:
    """Write the location as `input[2].content`, without the union's tags."""
    path = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _FIELDS or not path:
            path += f".{part}" if path else part
    return path or None


_FIELDS = frozenset(
    {
        *("role", "content", "text", "type", "id", "call_id", "name", "arguments", "output", "summary"),
        *("parameters", "strict", "description", "format", "schema", "effort", "verbosity"),
        *TOKEN_FIELDS,
    }
)


def _headers(error: PolicyError) -> dict[str, str]:
    """Return what goes into the head of an answer that refuses."""
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, BusyError):
        return {"Retry-After": str(math.ceil(error.retry_after_s))}
    return {}


def is_anthropic(path: str) -> bool:
    """Return whether a path belongs to Anthropic's API; all others have OpenAI's shapes."""
    return _ANTHROPIC_PATH.fullmatch(path) is not None


def error_body(request: web.Request, problem: Problem) -> dict[str, Any]:
    """Return what says that a request failed, in the shape of the API that was called.

    It is the body of an answer, and the data of a stream's error event.
    """
    if is_anthropic(request.path):
        return {"type": "error", "error": problem.to_anthropic(), "request_id": request.get(REQUEST_ID)}
    return {"error": problem.to_wire()}


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in the API's shape; nothing leaves as a bare traceback."""
    try:
        return await handler(request)
    except Exception as error:
        if request.transport is None:
            raise ConnectionResetError("the client went away") from error
        problem = request[PROBLEM] = _routed(request, problem_of(error))
        if problem.kind == "server_error" and not isinstance(error, PolicyError):
            unforeseen = problem.status in (500, 502)
            _log.error("%s %s failed: %s", request.method, request.path, problem.message, exc_info=unforeseen)
        if request.writer.output_size > 0:  # a second head would look like a piece of the first answer
            raise ConnectionAbortedError("the answer had begun when it failed") from error
        answer = json_response(error_body(request, problem), status=problem.status)
        answer.headers.update(problem.headers)
        if problem.status == 408:
            answer.force_close()
        return answer


def _routed(request: web.Request, problem: Problem) -> Problem:
    """Say which route there is not: aiohttp's own errors don't."""
    if request.match_info.http_exception is None:
        return problem
    message = f"{problem.message}: {request.method} {request.path}"
    for path, why in _NOT_HERE.items():
        if request.path.endswith(path):
            return replace(problem, status=404, message=f"{message}: {why}", code="unknown_url", headers={})
    return replace(problem, message=message, code="unknown_url")


_NOT_HERE = {
    "/responses/compact": "histories are not compacted here; send a shorter one, or `truncation: auto`",
    "/conversations": "there are no conversations here; continue a response by `previous_response_id`",
    "/embeddings": "a policy generates; it embeds nothing",
}
"""Routes of OpenAI's API that clients look for, and what to do instead."""
