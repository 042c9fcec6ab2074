"""API keys over real connections: who gets in, who doesn't, and what is never shown."""

from __future__ import annotations

import pytest
from support.operating import ASK, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.operation import AccessConfig
from gym_sdk import GymClient
from gym_sdk.errors import PolicyError

pytestmark = pytest.mark.asyncio

BOTH = AccessConfig(api_keys=("model-1", "model-2"), admin_api_keys=("admin-1",))


@pytest.fixture
def policy(renderer: TemplateRenderer) -> Policy:
    return Policy(ReplayEngine([renderer.encode("three")] * 8), renderer)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "model", "admin"),
    [
        ({}, 401, 401),
        (bearer("wrong"), 401, 401),
        (bearer(""), 401, 401),
        (bearer("model-"), 401, 401),
        (bearer("model-1 "), 200, 403),
        ({"Authorization": "Basic model-1"}, 401, 401),
        ({"Authorization": "model-1"}, 401, 401),
        (bearer("model-1"), 200, 403),
        ({"Authorization": "bearer model-2"}, 200, 403),
        ({"x-api-key": "model-2"}, 200, 403),
        ({"x-api-key": "admin-1"}, 200, 200),
        (bearer("admin-1"), 200, 200),
        ({"x-api-key": "admin-1", **bearer("wrong")}, 200, 200),
        ({"x-api-key": "schlüssel"}, 401, 401),
    ],
)
async def test_each_kind_of_route_has_its_key(
    policy: Policy, headers: dict[str, str], model: int, admin: int
) -> None:
    async with operated(policy, access=BOTH) as server:
        for method, path, status in [
            ("POST", "/v1/responses", model),
            ("GET", "/v1/models", model),
            ("POST", "/rollouts/r1", 201 if model == 200 else model),
            ("GET", "/openapi.json", model),
            ("POST", "/continue_generation", admin),
            ("GET", "/metrics", admin),
        ]:
            body = ASK if path == "/v1/responses" else None
            answer = await server.ask(method, path, headers=headers, json=body)
            assert answer.status == status, path
            assert ("www-authenticate" in answer.headers) == (status == 401)
            if status >= 400:
                assert answer.code == ("invalid_api_key" if status == 401 else "insufficient_permissions")
                assert not any(key in str(answer.body) for key in BOTH.keys)


async def test_health_is_open_but_says_little_without_a_key(policy: Policy) -> None:
    async with operated(policy, access=BOTH) as server:
        assert (await server.ask("GET", "/health")).body == {"status": "ok"}
        assert (await server.ask("GET", "/health", headers=bearer("wrong"))).body == {"status": "ok"}
        assert (await server.ask("GET", "/health", headers=bearer("model-1"))).body["weight_version"] == "0"


async def test_without_keys_everything_is_open(policy: Policy) -> None:
    async with operated(policy) as server:
        assert (await server.ask("POST", "/v1/responses", json=ASK)).status == 200
        assert (await server.ask("GET", "/metrics")).status == 200
        assert (await server.ask("GET", "/health")).body["weight_version"] == "0"


@pytest.mark.parametrize("access", [AccessConfig(api_keys=("k",)), AccessConfig(admin_api_keys=("k",))])
async def test_one_kind_of_key_closes_everything_to_those_without(
    policy: Policy, access: AccessConfig
) -> None:
    async with operated(policy, access=access) as server:
        for path in ("/v1/models", "/metrics", "/get_world_size", "/v1/nowhere", "/nowhere"):
            assert (await server.ask("GET", path)).status == 401
        admin = (await server.ask("GET", "/metrics", headers=bearer("k"))).status
        assert admin == (200 if access.admin_api_keys else 403)
        assert (await server.ask("GET", "/v1/nowhere", headers=bearer("k"))).status == 404


async def test_our_client_and_openais_send_the_key(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    async with operated(policy, access=BOTH) as server:
        url = f"{server.url}/v1"
        async with GymClient(url, model="policy", api_key="model-1") as client:
            assert (await client.respond("q")).status == "incomplete"
            async with client.openai() as openai:
                assert [model.id async for model in openai.models.list()] == ["policy"]
            with pytest.raises(PolicyError, match="admin API key") as caught:
                await client.update_weights("folder", version="2")
            assert caught.value.status == 403
        async with GymClient(url, model="policy") as client:
            with pytest.raises(PolicyError) as caught:
                await client.respond("q")
            assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        monkeypatch.setenv("GYM_SDK_API_KEY", "model-2")
        async with GymClient(url, model="policy") as client:
            assert (await client.respond("q")).status == "incomplete"


async def test_errors_of_anthropics_routes_have_anthropics_shape(policy: Policy) -> None:
    async with operated(policy, access=BOTH) as server:
        for path in ("/v1/messages", "/rollouts/r1/v1/messages/count_tokens"):
            answer = await server.ask("POST", path, json={}, headers={"x-request-id": "mine"})
            assert answer.status == 401
            error = answer.body["error"]
            assert (answer.body["type"], answer.body["request_id"]) == ("error", "mine")
            assert (error["type"], set(error)) == ("authentication_error", {"type", "message"})
            assert answer.headers["request-id"] == "mine"
