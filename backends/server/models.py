"""The one model, as OpenAI lists models."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from backends.requests import check_model
from backends.server.answering import CAPTURES, POLICY
from backends.server.errors import json_response

__all__ = ["add_model_routes"]


def add_model_routes(app: web.Application) -> None:
    """Add the routes for captured agents and all others."""
    started_at = int(time.time())

    def served(http: web.Request) -> dict[str, Any]:
        rollout_id = http.match_info.get("rollout_id")
        if rollout_id is not None:
            http.app[CAPTURES].get(rollout_id)
        policy = http.app[POLICY]
        return {
            "id": policy.name,
            "object": "model",
            "created": started_at,
            "owned_by": "gym-sdk",
            "max_model_len": policy.engine.info.context_length,
        }

    async def every(http: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [served(http)]})

    async def one(http: web.Request) -> web.Response:
        model = served(http)
        check_model(http.match_info["model"], http.app[POLICY].name)
        return json_response(model)

    for root in ("/v1", "/rollouts/{rollout_id}/v1"):
        app.router.add_get(f"{root}/models", every)
        app.router.add_get(f"{root}/models/{{model:.+}}", one)
