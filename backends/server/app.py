"""The routes: OpenAI's, and SGLang's for weights and pauses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic_core import from_json

from backends.policy import Policy
from backends.server.chat import chat_completion, request_from_chat
from backends.server.errors import error_middleware, json_response
from gym_sdk.errors import PolicyError
from gym_sdk.schema import ResponseRequest

__all__ = ["POLICY", "make_app"]

POLICY = web.AppKey("policy", Policy)

_MAX_BODY_BYTES = 256 * 2**20  # token fields of long histories are large


def make_app(policy: Policy) -> web.Application:
    """Return the application over a policy. The policy stays the caller's to close."""
    app = web.Application(middlewares=[error_middleware], client_max_size=_MAX_BODY_BYTES)
    app[POLICY] = policy
    app.add_routes(
        [
            web.post("/v1/responses", _responses),
            web.post("/v1/chat/completions", _chat_completions),
            web.get("/v1/models", _models),
            web.get("/health", _health),
            web.post("/update_weights_from_disk", _update_weights_from_disk),
            web.post("/pause_generation", _pause_generation),
            web.post("/continue_generation", _continue_generation),
            web.post("/abort_request", _abort_request),
        ]
    )
    return app


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = from_json(await request.read())
    except ValueError as error:
        raise PolicyError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise PolicyError("the body must be a JSON object", code="invalid_json")
    return body


async def _responses(request: web.Request) -> web.Response:
    body = ResponseRequest.model_validate(await _body(request))
    response = await request.app[POLICY].respond(body)
    return json_response(response.to_wire())


async def _chat_completions(request: web.Request) -> web.Response:
    body = request_from_chat(await _body(request))
    response = await request.app[POLICY].respond(body)
    return json_response(chat_completion(response))


async def _models(request: web.Request) -> web.Response:
    policy = request.app[POLICY]
    model = {
        "id": policy.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "gym-sdk",
        "max_model_len": policy.engine.info.context_length,
    }
    return json_response({"object": "list", "data": [model]})


async def _health(request: web.Request) -> web.Response:
    policy = request.app[POLICY]
    info = policy.engine.info
    return json_response(
        {
            "status": "ok",
            "model": policy.name,
            "weight_version": info.weight_version,
            "running": info.running,
            "waiting": info.waiting,
            "stats": policy.stats,
        }
    )


async def _update_weights_from_disk(request: web.Request) -> web.Response:
    body = await _body(request)
    path, version = body.get("model_path"), body.get("weight_version")
    if not isinstance(path, str):
        raise PolicyError("model_path must name a folder on this machine", param="model_path")
    if not isinstance(version, str):
        raise PolicyError("weight_version must be text that labels these weights", param="weight_version")
    policy = request.app[POLICY]
    await policy.update_weights(Path(path), version=version)
    return json_response({"success": True, "weight_version": policy.engine.info.weight_version})


async def _pause_generation(request: web.Request) -> web.Response:
    mode = (await _body(request)).get("mode", "in_place")
    if mode not in ("abort", "retract", "in_place"):
        raise PolicyError("mode must be `abort`, `retract` or `in_place`", param="mode")
    await request.app[POLICY].pause(mode)
    return json_response({"success": True})


async def _continue_generation(request: web.Request) -> web.Response:
    await request.app[POLICY].continue_generation()
    return json_response({"success": True})


async def _abort_request(request: web.Request) -> web.Response:
    if not (await _body(request)).get("abort_all"):
        raise PolicyError(
            "only `abort_all: true` is supported; a single request ends when its client disconnects",
            param="abort_all",
        )
    return json_response({"success": True, "aborted": await request.app[POLICY].engine.abort()})
