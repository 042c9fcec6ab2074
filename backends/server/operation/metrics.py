"""`/metrics`, in Prometheus's text format.

What the policy and the engine count anyway is read when somebody asks; only requests are counted one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from backends.policy import Policy
from backends.server.errors import Problem
from backends.server.operation.traffic import Traffic

__all__ = ["METRICS", "Metrics", "metrics_page"]

_BUCKETS_S = (0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LIMITS = {
    "invalid_api_key": "key",
    "insufficient_permissions": "key",
    "origin_not_allowed": "origin",
    "request_too_large": "body_size",
    "request_timeout": "body_pace",
    "rate_limit_exceeded": "concurrency",
    "server_stopping": "stopping",
    "DeadlineError": "deadline",
}
"""Limits by the codes, or the errors, that tell of them."""


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        policy: what answers.
        traffic: what is in flight.
    """

    def __init__(self, policy: Policy, traffic: Traffic) -> None:
        self.registry = registry = CollectorRegistry()
        self.in_flight = Gauge(
            "gym_http_requests_in_flight", "Requests that are being answered.", registry=registry
        )
        self.streams = Gauge("gym_http_streams_open", "Streams that are being written.", registry=registry)
        self._requests = Counter(
            "gym_http_requests",
            "Requests that are over, by status; 499 is a client that went away.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._durations = Histogram(
            "gym_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._rejected = Counter(
            "gym_http_rejected", "Requests that a limit ended.", ["limit"], registry=registry
        )
        registry.register(_PolicyCollector(policy, traffic))
        ProcessCollector(registry=registry)

    def finished(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Count a request that is over."""
        self.in_flight.dec()
        known = method if method in _METHODS else "other"  # a client can make up any number of them
        self._requests.labels(route, known, status).inc()
        self._durations.labels(route).observe(duration_s)

    def failed(self, problem: Problem) -> None:
        """Count a request that a limit ended; without effect if something else did."""
        if (limit := _LIMITS.get(problem.code or problem.error)) is not None:
            self._rejected.labels(limit).inc()


METRICS = web.AppKey("metrics", Metrics)


async def metrics_page(request: web.Request) -> web.Response:
    """Answer `GET /metrics`."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    body = encode(request.app[METRICS].registry)
    return web.Response(body=body, headers={"Content-Type": content_type})


class _PolicyCollector(Collector):
    """Reads what the policy, its engine and the traffic say at the moment."""

    def __init__(self, policy: Policy, traffic: Traffic) -> None:
        self._policy = policy
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        stats, info = self._policy.stats, self._policy.engine.info
        for counted in fields(stats):
            what = counted.name.replace("_", " ")
            yield CounterMetricFamily(
                f"gym_policy_{counted.name}", f"The policy's {what}.", value=getattr(stats, counted.name)
            )
        yield GaugeMetricFamily(
            "gym_model_calls_in_flight", "Model calls that take a place.", value=self._traffic.model_calls
        )
        yield GaugeMetricFamily(
            "gym_draining", "1 once the server is to stop.", value=int(self._traffic.draining)
        )
        yield GaugeMetricFamily("gym_engine_running", "Generations that are sampled.", value=info.running)
        yield GaugeMetricFamily("gym_engine_waiting", "Generations that wait.", value=info.waiting)
        labels = {"version": info.weight_version, "model": self._policy.name}
        yield InfoMetricFamily("gym_weights", "The weights that serve.", value=labels)
        if info.replicas:
            yield GaugeMetricFamily("gym_engine_replicas", "Replicas.", value=len(info.replicas))
            serving = sum(replica.serves for replica in info.replicas)
            yield GaugeMetricFamily("gym_engine_replicas_serving", "Replicas that serve.", value=serving)
