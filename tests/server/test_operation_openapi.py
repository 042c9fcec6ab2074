"""`/openapi.json`: valid, and true to the routes."""

from __future__ import annotations

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from support.operating import operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer

pytestmark = pytest.mark.asyncio


async def test_the_document_is_valid_and_complete(renderer: TemplateRenderer) -> None:
    async with operated(Policy(ReplayEngine([]), renderer)) as server:
        document = (await server.ask("GET", "/openapi.json")).body
        routes = {
            (route.method, route.resource.canonical)
            for route in server.app.router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
    OpenAPIV31SpecValidator(document).validate()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == routes
    ids = [entry["operationId"] for methods in document["paths"].values() for entry in methods.values()]
    assert len(ids) == len(set(ids))


async def test_operations_say_who_may_call_and_what_comes_back(renderer: TemplateRenderer) -> None:
    async with operated(Policy(ReplayEngine([]), renderer)) as server:
        document = (await server.ask("GET", "/openapi.json")).body
    respond = document["paths"]["/v1/responses"]["post"]
    assert respond["security"] == [{"bearer": []}, {"header": []}]
    assert set(respond["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert respond["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/ResponseRequest"
    )
    captured = document["paths"]["/rollouts/{rollout_id}/v1/responses"]["post"]
    named = [(parameter["in"], parameter["name"]) for parameter in captured["parameters"]]
    assert named == [("path", "rollout_id"), ("header", "Idempotency-Key")]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert document["paths"]["/pause_generation"]["post"]["security"][0] == {"adminBearer": []}
    upload = document["paths"]["/update_weights_from_tensor"]["post"]
    assert list(upload["requestBody"]["content"]) == ["application/octet-stream"]
