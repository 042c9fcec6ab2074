"""A server that is told to stop: in this process, and by signals to a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from support.held import HeldEngine, until
from support.operating import ASK, operated

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.operation import TRAFFIC

pytestmark = pytest.mark.asyncio


@pytest.fixture
def held(renderer: TemplateRenderer) -> HeldEngine:
    return HeldEngine([renderer.encode("three")] * 4)


async def test_calls_in_flight_finish_and_new_ones_are_sent_away(
    renderer: TemplateRenderer, held: HeldEngine
) -> None:
    async with operated(Policy(held, renderer)) as server:
        traffic = server.app[TRAFFIC]
        call = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        await until(lambda: held.running == 1)
        draining = asyncio.create_task(traffic.drain(60.0))
        await until(lambda: traffic.draining)
        health = await server.ask("GET", "/health")
        assert (health.status, health.body) == (503, {"status": "draining"})
        refused = await server.ask("POST", "/v1/responses", json=ASK)
        assert (refused.status, refused.code) == (503, "server_stopping")
        assert refused.headers["retry-after"] == "1"
        assert (await server.ask("GET", "/v1/models")).status == 200
        assert not draining.done()
        held.release.set()
        await asyncio.wait_for(draining, 10)
        assert (await call).status == 200


async def test_what_does_not_finish_is_cut_with_an_error(
    renderer: TemplateRenderer, held: HeldEngine
) -> None:
    async with operated(Policy(held, renderer)) as server:
        call = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        await until(lambda: held.running == 1)
        await server.app[TRAFFIC].drain(0.1)
        answer = await call
        assert (answer.status, answer.code) == (503, "server_stopping")
        assert held.cancelled == 1


async def test_a_server_that_is_in_a_hurry_does_not_wait(
    renderer: TemplateRenderer, held: HeldEngine
) -> None:
    hurry = asyncio.Event()
    async with operated(Policy(held, renderer)) as server:
        call = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        await until(lambda: held.running == 1)
        draining = asyncio.create_task(server.app[TRAFFIC].drain(3600.0, hurry))
        await until(lambda: server.app[TRAFFIC].draining)
        hurry.set()
        await asyncio.wait_for(draining, 10)
        assert (await call).status == 503


@asynccontextmanager
async def process(model: Path, *arguments: str) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """Run `gym-sdk serve` in a process of its own; yield it and its address."""
    ready, child = os.pipe()
    command = [
        sys.executable,
        "-m",
        "gym_sdk.cli",
        "serve",
        str(model),
        "--port",
        "0",
        "--ready-fd",
        str(child),
    ]
    serving = subprocess.Popen(
        [*command, *arguments], pass_fds=(child,), stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    os.close(child)
    try:
        with os.fdopen(ready) as line:
            port = await asyncio.to_thread(line.readline)
        yield serving, f"http://127.0.0.1:{port.strip()}"
    finally:
        serving.kill()
        serving.wait()
        assert serving.stderr is not None
        serving.stderr.close()


@pytest.mark.parametrize("signals", [1, 2])
async def test_signals_stop_a_server(untrained_policy: Path, signals: int) -> None:
    """One signal lets calls finish, within `--drain-s`; a second one does not wait for that."""
    drain_s = "0.3" if signals == 1 else "3600"
    arguments = ("--drain-s", drain_s, "--log-format", "json", "--log-level", "info")
    async with process(untrained_policy, *arguments) as (serving, url), aiohttp.ClientSession() as session:
        async with session.post(f"{url}/pause_generation", json={}) as paused:
            assert paused.status == 200

        async def call() -> tuple[int, str]:
            headers = {"x-request-id": "waits"}
            async with session.post(f"{url}/v1/responses", json=ASK, headers=headers) as answer:
                return answer.status, (await answer.json())["error"]["code"]

        waiting = asyncio.create_task(call())

        async def in_flight() -> bool:
            async with session.get(f"{url}/metrics") as answer:
                return "gym_model_calls_in_flight 1.0" in await answer.text()

        async with asyncio.timeout(20):
            while not await in_flight():
                await asyncio.sleep(0.02)
        serving.send_signal(signal.SIGTERM)
        if signals == 2:
            async with asyncio.timeout(20):
                while True:
                    async with session.get(f"{url}/health") as health:
                        if health.status == 503:
                            break
            serving.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(waiting, 20) == (503, "server_stopping")
        _, output = await asyncio.wait_for(asyncio.to_thread(serving.communicate), 20)
        assert serving.returncode == 0
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        (line,) = (line for line in lines if line.get("request_id") == "waits" and "status" in line)
        assert (line["status"], line["path"], line["error"]) == (503, "/v1/responses", "server_stopping")
