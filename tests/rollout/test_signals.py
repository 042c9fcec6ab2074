"""Signals: a real process, a real server, and what is left of both."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiohttp import web
from support.held import until
from support.scripted import call, say

from gym_sdk.errors import ConfigurationError
from gym_sdk.rollout import read_rollouts
from gym_sdk.rollout.signals import stop_on_signals
from gym_sdk.schema import Outcome
from gym_sdk.store import Journal

pytestmark = pytest.mark.asyncio


@dataclass
class Policy:
    """Answers the first task, has the others use a tool, and holds their second calls until released."""

    port: int = 0
    held: int = 0
    aborted: int = 0
    answered: int = 0
    resumed: list[list[str]] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def respond(self, request: web.Request) -> web.Response:
        items = (await request.json())["input"]
        kinds = [item["type"] for item in items]
        if self.release.is_set():
            self.resumed.append(kinds)
        elif "function_call_output" in kinds:
            self.held += 1
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.aborted += 1
                raise
        elif "q0" not in json.dumps(items):
            return web.Response(body=call(("look", "{}")).model_dump_json(), content_type="application/json")
        self.answered += 1
        return web.Response(body=say("x").model_dump_json(), content_type="application/json")


@asynccontextmanager
async def serving(policy: Policy) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/responses", policy.respond)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def collecting(folder: Path, url: str, *options: str) -> asyncio.subprocess.Process:
    (folder / "tasks.jsonl").write_text("".join(json.dumps({"input": f"q{n}"}) + "\n" for n in range(4)))
    (folder / "looking.py").write_text(
        "from gym_sdk import tool\n@tool\nasync def look() -> str:\n    '''Look.'''\n    return 'seen'\n"
    )
    arguments = ["rollout", "tasks.jsonl", "--url", url, "--tool", "looking:look", *options]
    source = str(Path(__file__).parents[2])
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gym_sdk.cli", *arguments),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    async with asyncio.timeout(30):
        out, error = await process.communicate()
    return process.returncode, out.decode(), error.decode()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_signal_ends_a_collection_that_the_same_command_goes_on_with(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    policy, store = Policy(), tmp_path / "out.jsonl"
    async with serving(policy) as url:
        process = await collecting(tmp_path, url, "--store", "out.jsonl", "--keep-partial")
        await until(lambda: policy.held == 3, timeout_s=30)
        process.send_signal(number)
        code, _, error = await ended(process)
        assert code == status, error
        assert f"stopped by {number.name}; what was finished is in out.jsonl" in error
        assert "Traceback" not in error
        await until(lambda: policy.aborted == 3)
        assert sorted(rollout.outcome for rollout in read_rollouts(store)) == [
            *[Outcome.CANCELLED] * 3,
            Outcome.COMPLETED,
        ]
        with Journal(store):  # nobody holds it
            policy.release.set()
        code, _, error = await ended(await collecting(tmp_path, url, "--out", "out.jsonl"))
        assert code == 0, error
    assert policy.resumed == [["message", "function_call", "function_call_output"]] * 3
    assert policy.answered == 4
    assert {rollout.outcome for rollout in read_rollouts(store)} == {Outcome.COMPLETED}


async def test_keeping_partial_rollouts_needs_a_file(tmp_path: Path) -> None:
    code, _, error = await ended(await collecting(tmp_path, "http://127.0.0.1:9/v1", "--keep-partial"))
    assert code == 1
    assert "--keep-partial needs a file" in error


# in this process: handlers and cancellations are as they were


async def test_a_signal_cancels_the_body_and_no_more() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    ended_properly = False
    async with stop_on_signals(signal.SIGUSR1, signal.SIGUSR2) as stop:
        try:
            signal.raise_signal(signal.SIGUSR2)
            await asyncio.sleep(60)
        finally:
            ended_properly = True
    assert ended_properly
    assert stop.signal is signal.SIGUSR2
    assert stop.exit_status == 128 + signal.SIGUSR2
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    assert {number: signal.getsignal(number) for number in before} == before


async def test_a_signal_at_the_very_end_leaves_no_cancellation_behind() -> None:
    async with stop_on_signals(signal.SIGUSR1) as stop:
        signal.raise_signal(signal.SIGUSR1)
    assert stop.signal is signal.SIGUSR1
    await asyncio.sleep(0)


async def test_an_error_of_the_body_goes_before_a_signal() -> None:
    with pytest.raises(ZeroDivisionError):
        async with stop_on_signals(signal.SIGUSR1) as stop:
            signal.raise_signal(signal.SIGUSR1)
            raise ZeroDivisionError
    assert stop.signal is signal.SIGUSR1
    await asyncio.sleep(0)


async def test_errors_and_other_cancellations_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        async with stop_on_signals(signal.SIGUSR1) as stop:
            raise ZeroDivisionError
    assert (stop.signal, stop.exit_status) == (None, 0)

    async def cancelled() -> None:
        async with stop_on_signals(signal.SIGUSR1):
            await asyncio.sleep(60)

    task = asyncio.create_task(cancelled())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_other_threads_get_no_signals() -> None:
    found: list[Any] = []

    async def enter() -> None:
        with pytest.raises(ConfigurationError, match="main thread"):
            async with stop_on_signals():
                pass
        found.append("refused")

    thread = Thread(target=lambda: asyncio.run(enter()))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert found == ["refused"]
