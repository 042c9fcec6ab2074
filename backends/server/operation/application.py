"""An application that is ready to be operated: routes are added to it, and need not know of any of this."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from backends.policy import Policy
from backends.server.errors import error_middleware, json_response
from backends.server.operation.auth import KEYS, Keys, require_keys
from backends.server.operation.bodies import read_bodies
from backends.server.operation.browsers import ORIGINS, Origins, guard_origins, mark_origin
from backends.server.operation.config import OperationConfig
from backends.server.operation.metrics import METRICS, Metrics, metrics_page
from backends.server.operation.observing import mark_answer, observe
from backends.server.operation.openapi import Operation, openapi_document
from backends.server.operation.traffic import TRAFFIC, Traffic, admit

__all__ = ["operated_application"]


def operated_application(
    policy: Policy, operations: Sequence[Operation], config: OperationConfig | None = None
) -> web.Application:
    """Return an application with keys, limits, metrics, logs and its own description.

    Args:
        policy: whose figures the metrics show.
        operations: all routes, for `/openapi.json`.
        config: how it is operated.
    """
    config = config or OperationConfig()
    app = web.Application(
        # from the outside in: what an outer one refuses, an inner one never sees
        middlewares=[observe, error_middleware, guard_origins, require_keys, admit, read_bodies],
        client_max_size=config.limits.max_body_bytes,
    )
    traffic = app[TRAFFIC] = Traffic(config.limits)
    app[KEYS] = Keys(config.access)
    app[ORIGINS] = Origins(config.access.cors_origins)
    app[METRICS] = Metrics(policy, traffic)
    app.on_response_prepare.append(mark_answer)
    app.on_response_prepare.append(mark_origin)
    document = openapi_document(operations, version="1")

    async def openapi(request: web.Request) -> web.Response:
        return json_response(document)

    app.router.add_get("/openapi.json", openapi)
    app.router.add_get("/metrics", metrics_page)
    return app
