"""The routes: OpenAI's, and SGLang's for pauses; those for weights are in `weights.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from aiohttp import web

from backends.completing import Completer
from backends.policy import Policy
from backends.server.answering import (
    CAPTURES,
    DEFAULT_FORM,
    KEEP_ALIVE_S,
    POLICY,
    answering,
    read_body,
)
from backends.server.capture import CaptureLimits
from backends.server.captures import CaptureStore
from backends.server.errors import json_response
from backends.server.idempotency import IdempotencyLimits, add_idempotency, idempotent
from backends.server.models import add_model_routes
from backends.server.operation import TRAFFIC, OperationConfig, operated_application, sees_details
from backends.server.operations import OPERATIONS
from backends.server.state import BackgroundLimits, ResponseStore
from backends.server.state.routes import add_state_routes
from backends.server.surfaces import ChatSurface, CompletionSurface, MessagesSurface, ResponsesSurface
from backends.server.tokenizing import add_tokenizing_routes
from backends.server.weights import WeightLimits, add_weight_routes
from gym_sdk.errors import PolicyError
from gym_sdk.schema import TokenForm

__all__ = ["POLICY", "make_app"]


def make_app(
    policy: Policy,
    *,
    captures: CaptureLimits | None = None,
    keep_alive_s: float = 15.0,
    token_form: TokenForm = "item",
    weights: WeightLimits | None = None,
    operation: OperationConfig | None = None,
    store: ResponseStore | None = None,
    background: BackgroundLimits | None = None,
    idempotency: IdempotencyLimits | None = None,
) -> web.Application:
    """Return the application over a policy. The policy stays the caller's to close.

    Args:
        policy: what answers.
        captures: how much is kept of captured rollouts.
        keep_alive_s: how often a stream that waits for its generation says that it is alive.
        token_form: where responses carry their tokens, unless a request's header says otherwise.
        weights: how much room tensors get that are sent as a body.
        operation: who may call, and how much the server takes on.
        store: keeps responses; the application closes it. By default they are kept in memory.
        background: how much may run in the background.
        idempotency: how much is kept of answers to calls with an `Idempotency-Key`.
    """
    app = operated_application(policy, OPERATIONS, operation)
    app[POLICY] = policy
    app[CAPTURES] = CaptureStore(captures)
    app[KEEP_ALIVE_S] = keep_alive_s
    app[DEFAULT_FORM] = token_form
    app.cleanup_ctx.append(_sweeping)
    add_idempotency(app, idempotency)
    for root in ("/v1", "/rollouts/{rollout_id}/v1"):
        for surface in (ResponsesSurface(), ChatSurface(), MessagesSurface()):
            app.router.add_post(f"{root}/{surface.name}", idempotent(answering(surface)))
    app.router.add_post("/v1/completions", idempotent(answering(CompletionSurface(Completer(policy)))))
    app.add_routes(
        [
            web.post("/rollouts/{rollout_id}", _begin_capture),
            web.get("/rollouts/{rollout_id}", _read_capture),
            web.delete("/rollouts/{rollout_id}", _end_capture),
            web.get("/health", _health),
            web.post("/pause_generation", _pause_generation),
            web.post("/continue_generation", _continue_generation),
            web.post("/abort_request", _abort_request),
        ]
    )
    add_model_routes(app)
    add_tokenizing_routes(app)
    add_state_routes(app, store=store, background=background)
    add_weight_routes(app, weights)
    return app


async def _sweeping(app: web.Application) -> AsyncIterator[None]:
    """Drop unused captures for as long as the application runs."""
    store = app[CAPTURES]

    async def sweep() -> None:
        while True:
            await asyncio.sleep(min(60.0, store.limits.ttl_s / 2))
            store.sweep()

    task = asyncio.create_task(sweep())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _begin_capture(request: web.Request) -> web.Response:
    capture = request.app[CAPTURES].begin(request.match_info["rollout_id"])
    return json_response({"id": capture.id, "object": "capture"}, status=201)


async def _read_capture(request: web.Request) -> web.Response:
    after = _after(request)
    capture = request.app[CAPTURES].get(request.match_info["rollout_id"])
    return web.Response(body=capture.page(after), content_type="application/json")


async def _end_capture(request: web.Request) -> web.Response:
    after = _after(request)
    capture = await request.app[CAPTURES].end(request.match_info["rollout_id"])
    return web.Response(body=capture.rest(after), content_type="application/json")


def _after(request: web.Request) -> int:
    text = request.query.get("after", "0")
    if not (text.isascii() and text.isdigit()):
        raise PolicyError(
            f"after must be how many calls are known already, not {text!r}",
            code="invalid_value",
            param="after",
        )
    return int(text)


async def _health(request: web.Request) -> web.Response:
    if request.app[TRAFFIC].draining:
        return json_response({"status": "draining"}, status=503)
    policy = request.app[POLICY]
    info = policy.engine.info
    served = not info.replicas or any(replica.serves for replica in info.replicas)
    status = "ok" if served else "waiting for SGLang"
    code = 200
    if info.problem is not None:
        status, code = "broken", 503
    if not sees_details(request):
        return json_response({"status": status}, status=code)
    return json_response(
        {
            "status": status,
            "problem": info.problem,
            "model": policy.name,
            "parser": policy.reader.name,
            "weight_version": info.weight_version,
            "running": info.running,
            "waiting": info.waiting,
            "replicas": info.replicas,
            "captures": len(request.app[CAPTURES]),
            "stats": policy.stats,
        },
        status=code,
    )


async def _pause_generation(request: web.Request) -> web.Response:
    mode = (await read_body(request)).get("mode", "in_place")
    if mode not in ("abort", "retract", "in_place"):
        raise PolicyError("mode must be `abort`, `retract` or `in_place`", param="mode")
    await request.app[POLICY].pause(mode)
    return json_response({"success": True})


async def _continue_generation(request: web.Request) -> web.Response:
    await request.app[POLICY].continue_generation()
    return json_response({"success": True})


async def _abort_request(request: web.Request) -> web.Response:
    if not (await read_body(request)).get("abort_all"):
        raise PolicyError(
            "only `abort_all: true` is supported; a single request ends when its client disconnects",
            param="abort_all",
        )
    return json_response({"success": True, "aborted": await request.app[POLICY].engine.abort()})
