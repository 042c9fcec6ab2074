"""What the server costs over its engine, what an open stream takes, and what constraints and log-probs do.

The embedded engine on a CPU, with a tiny policy that never ends a turn, so that every answer has the same
length. The engine and the policy are called in this process; the server has a process of its own, and so has
the load generator that asks it. The ways to ask take turns within each run, so that other work on the machine
hits all of them, and what is said to be more than the engine's is a difference within a run.

    python benchmarks/server.py
    python benchmarks/server.py --parts calls --concurrent 1 --runs 9 --output server.json
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from _load import Block, Outcome, load_generator, timed
from _report import Report
from gateway import Messages, conversations, cpu_s, find, never_ending
from pydantic_core import to_json

from backends.engine import GenerationRequest, SamplingParams
from backends.loading import PolicyConfig, open_policy
from backends.policy import Policy
from backends.rendering.renderer import Conversation
from backends.tiny import cached_tiny_policy
from gym_sdk.launch import launch_server
from gym_sdk.schema import ResponseRequest, as_items

ENGINE = "engine alone"
OPEN = 2000
REQUESTS = {1: 24, 8: 48, 64: 128, 512: 512}
"""How many requests a turn has, by how many are in flight."""
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 500}
"""The schema of a list that goes on for longer than any answer here."""

Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Way:
    """One way to ask over HTTP.

    Attributes:
        name: for the table.
        path: where to ask.
        body: what to send for a conversation.
    """

    name: str
    path: str
    body: Callable[[Messages], dict[str, Any]]


def responses(new_tokens: int, **more: Any) -> Callable[[Messages], dict[str, Any]]:
    """Return what makes bodies of the Responses API."""
    return lambda messages: {"input": messages, "max_output_tokens": new_tokens, **more}


def chat(new_tokens: int, **more: Any) -> Callable[[Messages], dict[str, Any]]:
    """Return what makes bodies of Chat Completions."""
    return lambda messages: {"messages": messages, "max_tokens": new_tokens, **more}


def call_ways(new_tokens: int) -> list[Way]:
    """Return the ways whose cost over the engine is measured."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return [
        Way("responses", "responses", responses(new_tokens)),
        Way("responses, stream", "responses", responses(new_tokens, stream=True)),
        Way("chat", "chat/completions", chat(new_tokens)),
        Way("chat, stream", "chat/completions", chat(new_tokens, **usage)),
    ]


def option_ways(new_tokens: int) -> list[Way]:
    """Return the ways whose tokens a second are compared, the plain one first."""
    form = {"format": {"type": "json_schema", "name": "list", "schema": LIST}}
    scored = ["message.output_text.logprobs"]
    return [
        Way(name, "responses", responses(new_tokens, **more))
        for name, more in (
            ("free", {}),
            ("json_schema", {"text": form}),
            ("log-probs of the text", {"include": scored}),
            ("log-probs of 20 tokens", {"include": scored, "top_logprobs": 20}),
            ("stream", {"stream": True}),
            ("json_schema, stream", {"text": form, "stream": True}),
        )
    ]


def in_process(policy: Policy, new_tokens: int) -> dict[str, Send]:
    """Return the ways to ask without HTTP."""
    sampling = SamplingParams(new_tokens, stop_token_ids=policy.renderer.stop_token_ids)
    names = iter(range(10**9))

    async def engine(prompt: list[int]) -> None:
        generation = await policy.engine.generate(GenerationRequest(f"e{next(names)}", prompt, sampling))
        assert len(generation.token_ids) == new_tokens

    async def respond(messages: Messages) -> None:
        body = responses(new_tokens)(messages)
        answer = await policy.respond(ResponseRequest.model_validate(body))
        assert answer.usage is not None
        assert answer.usage.output_tokens == new_tokens

    return {ENGINE: engine, "Policy.respond": respond}


@dataclass(frozen=True)
class Stand:
    """What is measured.

    Attributes:
        policy: in this process.
        url: of the server.
        processes: the server's.
        pipe: of the load generator.
    """

    policy: Policy
    url: str
    processes: list[int]
    pipe: Connection

    def ask(self, way: Way, bodies: list[bytes], level: int) -> Outcome:
        """Have the load generator ask the server."""
        self.pipe.send(Block(f"{self.url}/{way.path}", bodies, level))
        outcome: Outcome = self.pipe.recv()
        return outcome

    async def calls(self, report: Report, levels: list[int], new_tokens: int, runs: int) -> None:
        """Measure all ways to ask, beside the engine alone."""
        for level in levels:
            print(f"{level} in flight", flush=True)
            found: dict[tuple[str, str], list[float]] = defaultdict(list)
            for run in range(-1, runs):  # the first one opens connections
                costs = await self._call_turn(level, new_tokens, f"{level} {run}")
                if run < 0:
                    continue
                for way, cost in costs.items():
                    for what in ("p50 latency, ms", "p99 latency, ms"):
                        if way != ENGINE:
                            cost[f"{what}, more than the engine alone"] = cost[what] - costs[ENGINE][what]
                    for what, value in cost.items():
                        found[way, what].append(value)
            for (way, what), values in found.items():
                report.add(values, way=way, what=what, level=f"{level} in flight")

    async def _call_turn(self, level: int, new_tokens: int, seed: str) -> dict[str, dict[str, float]]:
        chance, count = random.Random(seed), REQUESTS.get(level, level)
        plain, http = in_process(self.policy, new_tokens), {way.name: way for way in call_ways(new_tokens)}
        costs: dict[str, dict[str, float]] = {}
        for name in chance.sample([*plain, *http], len(plain) + len(http)):
            asked = conversations(count, chance)
            if name in http:
                before = cpu_s(self.processes)
                bodies = [to_json(http[name].body(messages)) for messages in asked]
                outcome = await asyncio.to_thread(self.ask, http[name], bodies, level)
                if outcome.tokens != count * new_tokens:
                    raise RuntimeError(f"{name} sampled {outcome.tokens} tokens for {count} requests")
                costs[name] = costs_of(outcome)
                costs[name]["CPU per request of the server, ms"] = (
                    1e3 * (cpu_s(self.processes) - before) / count
                )
            else:
                items: list[Any] = asked
                if name == ENGINE:
                    render = self.policy.renderer.render
                    items = [render(Conversation(as_items(messages))).token_ids for messages in asked]
                costs[name] = costs_of(await timed(items, level, plain[name]))
        return costs

    async def options(self, report: Report, new_tokens: int, runs: int, level: int = 8) -> None:
        """Measure what constraints and log-probs do to the tokens a second."""
        rates: dict[str, list[float]] = defaultdict(list)
        ways = option_ways(new_tokens)
        for run in range(-1, runs):
            chance = random.Random(f"options {run}")
            turn = {}
            for way in chance.sample(ways, len(ways)):
                bodies = [to_json(way.body(messages)) for messages in conversations(2 * level, chance)]
                outcome = await asyncio.to_thread(self.ask, way, bodies, level)
                turn[way.name] = outcome.tokens / outcome.seconds
            if run >= 0:
                for name, rate in turn.items():
                    rates[name].append(rate)
                    rates[f"{name}, free is 1"].append(rate / turn[ways[0].name])
        for name, values in rates.items():
            way_name, _, relative = name.partition(", free")
            what = "throughput, free is 1" if relative else "tokens per second"
            report.add(values, way=way_name, what=what, level=f"{level} in flight, {new_tokens} tokens each")


def costs_of(outcome: Outcome) -> dict[str, float]:
    """Return what is reported of a turn."""
    latencies = sorted(outcome.latencies)
    costs = {
        "requests per second": len(latencies) / outcome.seconds,
        "p50 latency, ms": 1e3 * statistics.median(latencies),
        "p99 latency, ms": 1e3 * latencies[int(0.99 * (len(latencies) - 1))],
    }
    if outcome.first_deltas:
        costs["p50 time to the first delta, ms"] = 1e3 * statistics.median(outcome.first_deltas)
    return costs


async def open_stream_kib(folder: Path, log: Path) -> float:
    """Return what an open stream takes of a new server, in KiB, while it waits for its first token."""
    async with launch_server(folder, arguments=["--threads", "1"], log=log) as url:
        server = psutil.Process(find("gym_sdk.cli")[-1])
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:

            async def opened(number: int) -> aiohttp.ClientResponse:
                body = {"input": f"{number} + 1 =", "stream": True, "store": False, "max_output_tokens": 1}
                answer = await session.post(f"{url}/responses", json=body)
                await answer.content.readuntil(b"\n\n")
                return answer

            await (await opened(0)).read()
            await (await session.post(url.removesuffix("v1") + "pause_generation", json={})).read()
            before = server.memory_info().rss
            async with asyncio.TaskGroup() as group:
                streams = [group.create_task(opened(number)) for number in range(OPEN)]
            taken = server.memory_info().rss - before
            for stream in streams:
                stream.result().close()
        return float(taken) / OPEN / 2**10


@asynccontextmanager
async def stand(folder: Path, log: Path) -> AsyncIterator[Stand]:
    """Load the policy, and start the server and the load generator."""
    async with (
        open_policy(PolicyConfig(model=str(folder), threads=1)) as policy,
        launch_server(folder, arguments=["--threads", "1"], log=log) as url,
    ):
        processes = find("gym_sdk.cli")
        with load_generator() as pipe:
            yield Stand(policy, url, processes, pipe)


async def run(options: argparse.Namespace, report: Report) -> None:
    """Measure everything that is asked for."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = never_ending(cached_tiny_policy(), Path(temporary) / "model")
        log = Path(temporary) / "server.log"
        torch.set_num_threads(1)
        if {"calls", "options"} & {*options.parts}:
            async with stand(folder, log) as measured:
                if "calls" in options.parts:
                    await measured.calls(report, options.concurrent, options.new_tokens, options.runs)
                if "options" in options.parts:
                    await measured.options(report, options.long, options.runs)
        if "memory" in options.parts:
            taken = [await open_stream_kib(folder, log) for _ in range(options.runs)]
            report.add(taken, way="responses, stream", what="an open stream, KiB", level=f"{OPEN} open")


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["calls", "options", "memory"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[*REQUESTS])
    parser.add_argument("--new-tokens", type=int, default=4, help="of each answer, for what a request costs")
    parser.add_argument("--long", type=int, default=64, help="of each answer, for what tokens cost")
    parser.add_argument("--runs", type=int, default=5, help="of each cell; the median counts")
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    options = parser.parse_args()
    settings = {
        "new tokens": f"{options.new_tokens}; {options.long} with options",
        "runs": options.runs,
        "note": "The engine, the server and the load generator share the cores above.",
    }
    report = Report("The server over its engine", settings, ("gym-sdk", "aiohttp", "pydantic", "torch"))
    asyncio.run(run(options, report))
    report.show("way", "level", "what")
    if options.output:
        report.write(options.output)


if __name__ == "__main__":
    main()
