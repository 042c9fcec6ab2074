"""The HTTP transport against a real server that misbehaves on request."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gym_sdk import GymClient, Outcome, Retry
from gym_sdk.errors import (
    ConfigurationError,
    DeadlineError,
    PolicyError,
    TokenContractError,
    TransportError,
)
from gym_sdk.transport import Breaker
from gym_sdk.transport.http import HttpTransport

pytestmark = pytest.mark.asyncio

OK: dict[str, Any] = {
    "id": "resp_1",
    "created_at": 1.0,
    "model": "policy",
    "output": [{"type": "message", "role": "assistant", "content": "hi"}],
}
QUICK = Retry(attempts=3, base_s=0.001, max_s=0.2)
PATIENT = Breaker(failures=10)


class Faulty:
    """Answers each request with the next entry: a body, a (status, body, headers), or an action."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.times: list[float] = []
        self.headers: list[Any] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.times.append(time.monotonic())
        self.headers.append(request.headers)
        await request.read()
        answer = self.answers.pop(0)
        if answer == "drop":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if isinstance(answer, tuple):
            status, body, headers = answer
            return web.Response(status=status, body=body, headers=headers)
        return web.json_response(answer)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[GymClient]:
        app = web.Application()
        app.router.add_post("/v1/responses", self.handle)
        async with TestServer(app) as server:
            async with GymClient(
                str(server.make_url("/v1/")), model="policy", retry=QUICK, breaker=PATIENT, **options
            ) as client:
                yield client


async def test_it_retries_what_is_worth_retrying() -> None:
    when = email.utils.formatdate(time.time() - 5, usegmt=True)
    server = Faulty(
        "drop",
        (503, b"<html>busy</html>", {"Retry-After": "0.1"}),
        OK,
        (429, b'{"error": {"message": "slow down"}}', {"Retry-After": when}),
        OK,
    )
    async with server.client() as client:
        assert (await client.respond("q")).output_text == "hi"
        assert server.times[2] - server.times[1] >= 0.1
        assert (await client.respond("q")).output_text == "hi"


async def test_it_gives_up_with_the_last_failure() -> None:
    busy = (503, b'{"error": {"message": "queue full", "type": "server_error"}}', {"Retry-After": "nonsense"})
    server = Faulty(busy, busy, busy, OK)
    async with server.client() as client:
        with pytest.raises(TransportError, match="queue full") as caught:
            await client.respond("q")
    assert (caught.value.status, caught.value.retryable) == (503, True)
    assert len(server.times) == 3


async def test_it_does_not_repeat_what_was_refused() -> None:
    body = b'{"error": {"message": "no such tool", "type": "invalid", "param": "tools", "code": "bad"}}'
    server = Faulty((400, body, {}), OK)
    async with server.client() as client:
        with pytest.raises(PolicyError, match="no such tool") as caught:
            await client.respond("q")
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "tools", "bad")
    assert len(server.times) == 1


@pytest.mark.parametrize("body", [b"[]", b'{"id": "x"}'])
async def test_an_answer_that_is_no_response(body: bytes) -> None:
    server = Faulty((200, body, {}))
    async with server.client() as client:
        with pytest.raises(TransportError, match="no Response"):
            await client.respond("q")


async def test_an_answer_with_impossible_tokens() -> None:
    item = {**OK["output"][0], "prompt_token_ids": [1], "generation_token_ids": [2]}
    server = Faulty({**OK, "output": [item]})
    async with server.client() as client:
        with pytest.raises(TokenContractError, match="generation_log_probs missing"):
            await client.respond("q")


async def test_the_key_and_headers_travel() -> None:
    server = Faulty(OK)
    async with server.client(api_key="secret", headers={"X-Run": "7"}) as client:
        await client.respond("q")
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["X-Run"] == "7"


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        async with GymClient(f"http://127.0.0.1:{port}/v1", retry=QUICK, breaker=PATIENT) as client:
            with pytest.raises(TransportError, match="is the server running"):
                await client.respond("q")
            rollout = await client.rollout("q", verifier=lambda rollout: 1.0)
    assert rollout.outcome is Outcome.FAILED
    assert rollout.reward is None
    assert rollout.failure is not None
    assert rollout.failure.error == "TransportError"


async def test_more_requests_than_aiohttps_default_limit_run_at_once() -> None:
    running = most = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.3)
        running -= 1
        return web.json_response(OK)

    app = web.Application()
    app.router.add_post("/v1/responses", handle)
    async with TestServer(app) as server, GymClient(str(server.make_url("/v1"))) as client:
        await asyncio.gather(*(client.respond("q") for _ in range(150)))
    assert most > 100


async def test_misuse() -> None:
    transport = HttpTransport("http://localhost:1/v1")
    with pytest.raises(ConfigurationError, match="no tensors to send"):
        await transport.update_weights({}, version="1")
    with pytest.raises(ConfigurationError, match="not open"):
        await transport.update_weights("folder", version="1")


async def test_the_wait_between_tries_is_bounded() -> None:
    retry = Retry(attempts=5, base_s=1.0, max_s=4.0)
    for failures in range(1, 40):
        assert 0.0 <= retry.pause_s(failures, None) <= min(4.0, 2.0 ** (failures - 1))
    assert retry.pause_s(1, 3.0) >= 3.0
    assert retry.pause_s(1, 100.0) == 4.0


async def test_every_wait_of_the_client_has_a_deadline() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.json_response(OK)

    app = web.Application()
    app.router.add_post("/v1/responses", hang)
    app.router.add_post("/update_weights_from_disk", hang)
    async with TestServer(app, shutdown_timeout=0.1) as server:
        async with GymClient(str(server.make_url("/v1"))) as client:
            with pytest.raises(DeadlineError, match="the model call"):
                await client.respond("q", deadline_s=0.05)
            with pytest.raises(DeadlineError, match="the weight update"):
                await client.update_weights("folder", version="1", deadline_s=0.05)
