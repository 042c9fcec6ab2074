"""Bytes and CPU of a rollout's tokens on the wire: the `compact` form beside `item` and `response`.

A server process answers at once with a tool call, so that all its CPU is our own: parsing, the prefix rule,
JSON, HTTP. A client makes rollouts of 2, 11, 41 and 81 model calls after a prompt of about 8,000 tokens. The
forms take turns. Given are bytes per call, both ways together, and CPU time per call of each side.

    python benchmarks/wire.py
    python benchmarks/wire.py --calls 2 11 --runs 3 --output wire.json
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from _report import Report
from aiohttp import web

from backends.engine import EngineInfo, FinishReason, Generation, GenerationChunk, GenerationRequest
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from backends.tiny import cached_tiny_policy
from gym_sdk import GymClient, Limits, Task, tool
from gym_sdk.schema import TOKEN_FORMS, TokenForm
from gym_sdk.tokens import WeightSpan
from gym_sdk.transport.http import HttpTransport

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"key": "the next thing"}}\n</tool_call><|im_end|>'


@tool
def look_up(key: str) -> str:
    """Look something up."""
    return f"{key}: nothing was found here, so try another one"


class CallingEngine:
    """Calls the tool in every turn, at once."""

    def __init__(self, renderer: TemplateRenderer) -> None:
        self._ids = renderer.encode(CALL)
        self._info = EngineInfo(vocab_size=100_000, context_length=10**6, weight_version="0")

    @property
    def info(self) -> EngineInfo:
        """Sizes."""
        return self._info

    async def generate(self, request: GenerationRequest) -> Generation:
        """Return the call."""
        ids = list(self._ids)
        spans = (WeightSpan("0", 0, len(ids)),)
        return Generation(ids, [-0.123456789] * len(ids), FinishReason.STOP, spans)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Return the call in one piece."""
        generation = await self.generate(request)
        yield GenerationChunk(generation.token_ids, generation.log_probs, "0", generation.finish_reason)

    async def abort(self, request_id: str | None = None) -> int:
        """Nothing runs."""
        return 0

    async def pause(self, mode: str = "in_place") -> None:
        """Nothing runs."""

    async def continue_generation(self) -> None:
        """Nothing runs."""

    async def update_weights(self, source: object, *, version: str) -> None:
        """There are no weights."""

    async def aclose(self) -> None:
        """Nothing is held."""


class CountingTransport(HttpTransport):
    """Adds up the bytes of bodies."""

    moved = 0

    async def _send(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        answer = await super()._send(method, url, body, headers)
        self.moved += len(body or b"") + len(answer)
        return answer


def serve(folder: str, ready: Connection) -> None:
    """Serve in this process until it is ended."""

    async def main() -> None:
        renderer = TemplateRenderer.from_folder(folder)
        runner = web.AppRunner(make_app(Policy(CallingEngine(renderer), renderer)), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start the server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(str(folder), there), daemon=True)
    process.start()
    try:
        if not here.poll(120):
            raise TimeoutError("the server did not start within 120 s")
        yield f"http://127.0.0.1:{here.recv()}/v1", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join(10)


def cpu_s(process: psutil.Process) -> float:
    """CPU time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    url: str, process: psutil.Process, form: TokenForm, calls: int, prompt: str, rollouts: int
) -> dict[str, float]:
    """Make rollouts one after the other; return what a call cost."""
    transport = CountingTransport(url)
    async with GymClient.over(transport, model="policy", token_form=form) as client:
        await client.rollout(Task("warm up"), tools=[look_up], limits=Limits(max_turns=2))
        transport.moved = 0
        server_s, client_s = cpu_s(process), time.process_time()
        for _ in range(rollouts):
            rollout = await client.rollout(Task(prompt), tools=[look_up], limits=Limits(max_turns=calls))
            if len(rollout.model_calls) != calls or len(rollout.sequences()) != 1:
                raise RuntimeError(f"{form}: {rollout.failure or 'the rollout forked'}")
        server_s, client_s = cpu_s(process) - server_s, time.process_time() - client_s
    count = calls * rollouts
    return {
        "bytes per call": transport.moved / count,
        "server CPU per call, us": 1e6 * server_s / count,
        "client CPU per call, us": 1e6 * client_s / count,
        "server CPU per rollout, ms": 1e3 * server_s / rollouts,
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=[2, 11, 41, 81])
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    arguments = parser.parse_args()
    folder = cached_tiny_policy()
    words = "All work and no play makes this a very long prompt. "
    size = len(TemplateRenderer.from_folder(folder).encode(words))
    prompt = words * round(arguments.prompt_tokens / size)
    settings = {"prompt_tokens": arguments.prompt_tokens, "runs": arguments.runs}
    report = Report("The wire forms of tokens", settings, ("gym-sdk", "aiohttp", "pydantic", "transformers"))
    with server(folder) as (url, process):
        for calls in arguments.calls:
            found: dict[tuple[str, str], list[float]] = defaultdict(list)
            for _ in range(arguments.runs):
                for form in TOKEN_FORMS:
                    rollouts = max(1, 20 // calls)
                    costs = asyncio.run(measure(url, process, form, calls, prompt, rollouts))
                    for what, value in costs.items():
                        found[form, what].append(value)
            for (form, what), values in found.items():
                report.add(values, form=form, what=what, calls=f"{calls} calls")
    report.show("form", "calls", "what")
    if arguments.output:
        report.write(arguments.output)


if __name__ == "__main__":
    main()
