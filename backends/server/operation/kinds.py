"""What kind a route is. A route that is not listed here needs an admin key: forgetting one opens nothing."""

from __future__ import annotations

from enum import StrEnum

from aiohttp import web

__all__ = ["RouteKind", "is_model_call", "is_upload", "kind_of", "route_of"]

_PUBLIC = frozenset({"/health"})
_MODEL = frozenset({"/tokenize", "/detokenize", "/openapi.json"})
_MODEL_ROOTS = ("/v1/", "/rollouts/")
_CAPTURED = "/rollouts/{rollout_id}"
_MODEL_CALLS = frozenset({"/v1/responses", "/v1/chat/completions", "/v1/completions", "/v1/messages"})
_UPLOADS = frozenset({"/update_weights_from_tensor"})

_UNMATCHED = "unmatched"


class RouteKind(StrEnum):
    """Who may call a route."""

    PUBLIC = "public"
    """Everybody."""
    MODEL = "model"
    """Who uses the model."""
    ADMIN = "admin"
    """Who trains or operates it."""


def route_of(request: web.Request) -> str:
    """Return the route's pattern, such as `/rollouts/{rollout_id}`; `unmatched` if there is none."""
    resource = request.match_info.route.resource
    return _UNMATCHED if resource is None else resource.canonical


def kind_of(route: str) -> RouteKind:
    """Return what kind a route is, by its pattern."""
    if route in _PUBLIC:
        return RouteKind.PUBLIC
    # what is answered with 404 or 405 anyway tells nobody anything
    if route in _MODEL or route == _UNMATCHED or route.startswith(_MODEL_ROOTS):
        return RouteKind.MODEL
    return RouteKind.ADMIN


def is_model_call(request: web.Request) -> bool:
    """Return whether a request has the model generate, which takes one of the places that are limited."""
    return request.method == "POST" and route_of(request).removeprefix(_CAPTURED) in _MODEL_CALLS


def is_upload(request: web.Request) -> bool:
    """Return whether a request's body is read by its own route, under that route's own limit."""
    return route_of(request) in _UPLOADS
