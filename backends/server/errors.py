"""Errors in OpenAI's shape, with the right status."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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

__all__ = ["Problem", "error_middleware", "json_response", "problem_of", "validation_error"]

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """Return JSON, written by pydantic's serializer."""
    return web.Response(body=to_json(body), status=status, content_type="application/json")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request has no answer, as OpenAI's error object says it.

    Attributes:
        error: the class name of the error.
        status: the HTTP status.
        message: what was wrong, where, and what to do.
        kind: the error object's `type`.
        param: the request field at fault.
        code: OpenAI's error code.
    """

    error: str
    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """Return `{"message", "type", "param", "code"}`."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}


def problem_of(error: Exception) -> Problem:
    """Return what to answer for an error."""
    name = type(error).__name__
    match error:
        case PolicyError():
            kind = "not_found_error" if error.status == 404 else "invalid_request_error"
            if error.status >= 500:
                kind = "server_error"
            return Problem(name, error.status, str(error), kind, error.param, error.code)
        case ValidationError():
            return problem_of(validation_error(error))
        case CheckpointError() | ConfigurationError() | TokenContractError():
            return Problem(name, 400, str(error))
        case TransportError():  # an engine in another process does not answer
            return Problem(name, 503 if error.retryable else 502, str(error), "server_error")
        case DeadlineError():
            return Problem(name, 504, str(error), "server_error")
        case web.HTTPException():
            return Problem(name, error.status, error.reason)
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
        *("parameters", "strict", "description"),
        *TOKEN_FIELDS,
    }
)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in OpenAI's shape; nothing leaves as a bare traceback."""
    try:
        return await handler(request)
    except Exception as error:
        problem = problem_of(error)
        if problem.kind == "server_error" and not isinstance(error, PolicyError):
            _log.exception("%s %s failed", request.method, request.path)
        return json_response({"error": problem.to_wire()}, status=problem.status)
