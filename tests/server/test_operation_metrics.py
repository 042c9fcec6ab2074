"""`/metrics` over real connections, read by Prometheus's own parser."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from support.held import HeldEngine, until
from support.operating import ASK, Server, operated

from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.operation import AccessConfig, RequestLimits

pytestmark = pytest.mark.asyncio

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(server: Server) -> Samples:
    text = (await server.ask("GET", "/metrics")).body.decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_figures_are_what_happened(untrained_policy: Path) -> None:
    policy = load_policy(PolicyConfig(model=str(untrained_policy), context_length=256))
    try:
        async with operated(policy) as server:
            for _ in range(3):
                assert (await server.ask("POST", "/v1/responses", json=ASK)).status == 200
            await server.ask("POST", "/v1/responses", json={"input": [], "temperature": -1})
            await server.ask("PURGE", "/coffee/17")
            samples = await scrape(server)
            route = "/v1/responses"
            assert at(samples, "gym_http_requests_total", route=route, method="POST", status="200") == 3
            assert at(samples, "gym_http_requests_total", route=route, method="POST", status="400") == 1
            unmatched = {"route": "unmatched", "method": "other", "status": "404"}
            assert at(samples, "gym_http_requests_total", **unmatched) == 1
            assert at(samples, "gym_http_request_duration_seconds_count", route=route) == 4
            assert at(samples, "gym_http_requests_in_flight") == 1  # this one
            assert at(samples, "gym_http_streams_open") == 0
            for name in ("responses", "prompt_tokens", "generated_tokens", "forks", "bridges", "splices"):
                assert at(samples, f"gym_policy_{name}_total") == getattr(policy.stats, name)
            assert at(samples, "gym_policy_responses_total") == 3
            assert at(samples, "gym_weights_info", version="0", model="policy") == 1
            assert at(samples, "gym_engine_running") == 0
            assert at(samples, "process_resident_memory_bytes") > 0

            await policy.update_weights(str(untrained_policy), version="7")
            assert at(await scrape(server), "gym_weights_info", version="7", model="policy") == 1
    finally:
        await policy.aclose()


async def test_what_is_in_flight_and_what_limits_ended(renderer: TemplateRenderer) -> None:
    held = HeldEngine([renderer.encode("three")] * 4)
    limits = RequestLimits(max_concurrent=2, max_body_bytes=1000)
    async with operated(Policy(held, renderer), limits=limits) as server:
        call = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        stream = asyncio.create_task(server.ask("POST", "/v1/responses", json={**ASK, "stream": True}))
        await until(lambda: held.running == 2)

        async def streaming() -> bool:
            return at(await scrape(server), "gym_http_streams_open") == 1

        async with asyncio.timeout(10):
            while not await streaming():
                await asyncio.sleep(0.01)
        assert (await server.ask("POST", "/v1/responses", json=ASK)).status == 429
        samples = await scrape(server)
        assert at(samples, "gym_model_calls_in_flight") == 2
        assert at(samples, "gym_http_requests_in_flight") == 3
        assert at(samples, "gym_http_rejected_total", limit="concurrency") == 1
        held.release.set()
        assert (await call).status == (await stream).status == 200
        assert (await server.ask("POST", "/v1/responses", data=b" " * 2000)).status == 413
        samples = await scrape(server)
        assert at(samples, "gym_http_rejected_total", limit="body_size") == 1
        assert at(samples, "gym_http_streams_open") == 0
        assert at(samples, "gym_model_calls_in_flight") == 0


async def test_two_servers_share_nothing(renderer: TemplateRenderer) -> None:
    before = set(REGISTRY._names_to_collectors)
    engine = HeldEngine([])
    async with operated(Policy(engine, renderer)) as one, operated(Policy(engine, renderer)) as other:
        await one.ask("GET", "/v1/models")
        key = {"route": "/v1/models", "method": "GET", "status": "200"}
        assert at(await scrape(one), "gym_http_requests_total", **key) == 1
        assert ("gym_http_requests_total", frozenset(key.items())) not in await scrape(other)
    assert set(REGISTRY._names_to_collectors) == before


async def test_openmetrics_is_spoken_too(renderer: TemplateRenderer) -> None:
    async with operated(Policy(HeldEngine([]), renderer)) as server:
        headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
        answer = await server.ask("GET", "/metrics", headers=headers)
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        names = {family.name for family in read_openmetrics(answer.body.decode())}
        assert {"gym_http_requests_in_flight", "gym_weights"} <= names


async def test_wrong_keys_are_counted(renderer: TemplateRenderer) -> None:
    access = AccessConfig(admin_api_keys=("k",))
    async with operated(Policy(HeldEngine([]), renderer), access=access) as server:
        await server.ask("GET", "/v1/models")
        text = (await server.ask("GET", "/metrics", headers={"x-api-key": "k"})).body.decode()
        assert 'gym_http_rejected_total{limit="key"} 1.0' in text
