"""Errors in OpenAI's shape, with the right status."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import ErrorDetails, to_json

from gym_sdk.errors import (
    CheckpointError,
    ConfigurationError,
    GymError,
    PolicyError,
    TokenContractError,
)
from gym_sdk.schema import TOKEN_FIELDS

__all__ = ["error_middleware", "error_response", "json_response", "validation_error"]

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """Return JSON, written by pydantic's serializer."""
    return web.Response(body=to_json(body), status=status, content_type="application/json")


def error_response(
    status: int, message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> web.Response:
    """Return `{"error": {message, type, param, code}}`."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json_response({"error": error}, status=status)


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
    except PolicyError as error:
        kind = "not_found_error" if error.status == 404 else "invalid_request_error"
        return error_response(error.status, str(error), kind=kind, param=error.param, code=error.code)
    except ValidationError as error:
        policy_error = validation_error(error)
        return error_response(
            400,
            str(policy_error),
            kind="invalid_request_error",
            param=policy_error.param,
            code=policy_error.code,
        )
    except (CheckpointError, ConfigurationError, TokenContractError) as error:
        return error_response(400, str(error), kind="invalid_request_error")
    except web.HTTPException as error:
        return error_response(error.status, error.reason, kind="invalid_request_error")
    except Exception as error:
        _log.exception("%s %s failed", request.method, request.path)
        return error_response(500, f"{type(error).__name__}: {error}", kind="server_error")
