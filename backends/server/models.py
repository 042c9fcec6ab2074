"""The one model, as OpenAI lists models."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from backends.policy import Policy
from backends.server.answering import CAPTURES, POLICY
from backends.server.errors import json_response
from gym_sdk.errors import PolicyError

__all__ = ["add_model_routes", "check_model"]


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
        check_model(http.app[POLICY], http.match_info["model"])
        return json_response(model)

    for root in ("/v1", "/rollouts/{rollout_id}/v1"):
        app.router.add_get(f"{root}/models", every)
        app.router.add_get(f"{root}/models/{{model:.+}}", one)


def check_model(policy: Policy, name: str) -> None:
    """Refuse another model than the policy.

    Raises:
        PolicyError: there is none of this name (404).
    """
    if name != policy.name:
        raise PolicyError(
            f"the model {name!r} does not exist here; this server serves {policy.name!r}",
            status=404,
            code="model_not_found",
            param="model",
        )
