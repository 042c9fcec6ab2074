"""What this project's server costs over SGLang's own `/v1/chat/completions`.

One real SGLang on a CPU, with a tiny policy, and `gym-sdk serve` in front of it, each in processes of their
own. One load generator drives both: conversations of a system and a user message, all different, the same
number of tokens sampled at temperature 1 after each. The policy never ends a turn, so that every answer has
the same length. The ways to ask take turns within each run, so that other work on the machine hits all of
them; with 1 in flight they do so from request to request. Differences and ratios are those within a run.

Training needs ids and log-probs, so SGLang is asked for both (`logprobs`, `return_token_ids`). Beside that
stand what it does without them, and its `/generate` with ids that somebody else has rendered: the route that
this project's server calls.

    python benchmarks/gateway.py
    python benchmarks/gateway.py --concurrent 1 --new-tokens 4 --runs 9 --output gateway.json
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from _report import Report
from pydantic_core import from_json, to_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from backends.rendering import TemplateRenderer
from backends.rendering.renderer import Conversation
from backends.sglang import CPU_ARGUMENTS, launch_sglang
from backends.tiny import cached_tiny_policy
from gym_sdk.launch import launch_server
from gym_sdk.schema import TOKEN_FORM_HEADER, as_items

SYSTEM = "You add numbers. Say what you do."
BASE = "SGLang chat"
SERVER = "our server"
NOTE = (
    "All processes share the cores above: what the server and the load generator use, SGLang lacks. On a "
    "machine where each has a core of its own, and a GPU samples, throughput suffers less than here."
)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Way:
    """One way to ask for the same generation.

    Attributes:
        name: for the table.
        url: where to ask.
        body: what to send for a conversation.
        count: how many tokens an answer says it has sampled; it fails if ids or log-probs are missing.
        ours: whether this project's server answers.
        headers: beside those of JSON.
    """

    name: str
    url: str
    body: Callable[[Messages], dict[str, Any]]
    count: Callable[[Any], int]
    ours: bool = False
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Block:
    """Requests that the load generator sends as fast as they are answered."""

    url: str
    headers: dict[str, str]
    bodies: list[bytes]
    concurrent: int


@dataclass(frozen=True)
class Outcome:
    """What became of a block."""

    seconds: float
    latencies: list[float]
    answers: list[bytes]


async def drive(pipe: Connection) -> None:
    """Send blocks of requests until there is none."""
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(
        # SGLang closes connections that are idle for 5 s, and a request that meets the close is lost
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=1.0),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        while block := pipe.recv():
            pipe.send(await send(session, block))


async def send(session: aiohttp.ClientSession, block: Block) -> Outcome:
    """Send one block."""
    queue = iter(block.bodies)
    latencies: list[float] = []
    answers: list[bytes] = []

    async def client() -> None:
        for body in queue:
            started = time.perf_counter()
            async with session.post(block.url, data=body, headers=block.headers) as answer:
                data = await answer.read()
            latencies.append(time.perf_counter() - started)
            answers.append(data if answer.status == 200 else b"")
            if answer.status != 200:
                raise RuntimeError(f"{block.url} answered {answer.status}: {data[:300]!r}")

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(block.concurrent):
            group.create_task(client())
    return Outcome(time.perf_counter() - started, latencies, answers)


def generate_load(pipe: Connection) -> None:
    """Be the load generator, in a process of its own."""
    asyncio.run(drive(pipe))


@contextmanager
def load_generator() -> Iterator[tuple[Connection, int]]:
    """Start the load generator; yield its pipe and process id."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=generate_load, args=(there,), daemon=True)
    process.start()
    assert process.pid is not None
    there.close()
    try:
        yield here, process.pid
    finally:
        with suppress(BrokenPipeError):
            here.send(None)
        process.join(10)
        process.kill()


def never_ending(folder: Path, out: Path) -> Path:
    """Write a copy of a policy that never samples the token that ends a turn."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    embeddings: Any = model.get_input_embeddings().weight
    head = torch.nn.Parameter(embeddings.detach().clone())
    model.lm_head.weight = head
    with torch.no_grad():
        # one coordinate is the same everywhere, from the embeddings to the head, which reads it for the end
        embeddings[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.model.norm.weight[0] = 1.0
        head[:, 0] = 0.0
        head[tokenizer.eos_token_id] = 0.0
        head[tokenizer.eos_token_id, 0] = -1e4
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@asynccontextmanager
async def servers(folder: Path, python: str, log: Path) -> AsyncIterator[tuple[str, str]]:
    """Start SGLang and this project's server over it; yield the roots of both."""
    limits = ("--max-running-requests", "128", "--context-length", "1024")
    async with launch_sglang(
        folder, python=python, arguments=(*CPU_ARGUMENTS, *limits), log=log / "sglang.log"
    ) as sglang:
        arguments = ["--backend", "sglang", "--sglang-url", sglang.url]
        async with launch_server(folder, arguments=arguments, log=log / "server.log") as url:
            yield sglang.url, url.removesuffix("/v1")


def ways(sglang: str, server: str, folder: Path, new_tokens: int) -> list[Way]:
    """Return the ways to ask, the one that the others are compared with first."""
    renderer = TemplateRenderer.from_folder(folder)
    sampling = {"temperature": 1.0}

    def chat(**more: Any) -> Callable[[Messages], dict[str, Any]]:
        return lambda messages: {"messages": messages, "max_tokens": new_tokens, **sampling, **more}

    def items(messages: Messages) -> dict[str, Any]:
        return {"model": "policy", "input": messages, "max_output_tokens": new_tokens, **sampling}

    def ids(messages: Messages) -> dict[str, Any]:
        prompt = renderer.render(Conversation(as_items(messages))).token_ids
        params = {"max_new_tokens": new_tokens, "skip_special_tokens": False, **sampling}
        return {"input_ids": prompt, "return_logprob": True, "sampling_params": params}

    def same(ids: Sequence[int], log_probs: Sequence[object]) -> int:
        assert len(ids) == len(log_probs)
        return len(ids)

    def of_sglang(body: Any) -> int:
        choice = body["choices"][0]
        assert choice["prompt_token_ids"]
        return same(choice["response_token_ids"], choice["logprobs"]["content"])

    def of_fields(body: Any) -> int:
        assert body.get("prompt_token_ids") or body.get("new_prompt_token_ids")
        return same(body["generation_token_ids"], body["generation_log_probs"])

    chat_url, responses_url = f"{server}/v1/chat/completions", f"{server}/v1/responses"
    return [
        Way(
            BASE,
            f"{sglang}/v1/chat/completions",
            chat(logprobs=True, return_token_ids=True, skip_special_tokens=False),
            of_sglang,
        ),
        Way(
            "SGLang chat, neither ids nor log-probs",
            f"{sglang}/v1/chat/completions",
            chat(skip_special_tokens=False),
            lambda body: int(body["usage"]["completion_tokens"]),
        ),
        Way(
            "SGLang /generate, ids ready",
            f"{sglang}/generate",
            ids,
            lambda body: same(body["output_ids"], body["meta_info"]["output_token_logprobs"]),
        ),
        Way("our chat", chat_url, chat(), lambda body: of_fields(body["choices"][0]["message"]), True),
        Way("our responses, item", responses_url, items, lambda body: of_fields(body["output"][-1]), True),
        Way(
            "our responses, compact",
            responses_url,
            items,
            lambda body: of_fields(body["token_delta"]),
            True,
            ((TOKEN_FORM_HEADER, "compact"),),
        ),
    ]


def conversations(count: int, chance: random.Random) -> list[Messages]:
    """Return conversations that differ from their user message's first words on."""
    return [
        [
            {"role": "system", "content": SYSTEM},
            {
                "role": "user",
                "content": " + ".join(str(chance.randint(100, 999)) for _ in range(12)) + " = ?",
            },
        ]
        for _ in range(count)
    ]


def cpu_s(processes: Sequence[int]) -> float:
    """CPU time of processes so far; on Linux to the microsecond, elsewhere as psutil has it."""
    if platform.system() == "Linux":
        return sum(time.clock_gettime((~process << 3) | 2) for process in processes)  # clock_getcpuclockid(3)
    times = [psutil.Process(process).cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def find(words: str) -> list[int]:
    """Return the ids of the processes that this one has started with such a command, and their children."""
    for process in psutil.Process().children():
        if words in " ".join(process.cmdline()):
            return [process.pid, *(child.pid for child in process.children(recursive=True))]
    raise RuntimeError(f"no process runs {words}")


@dataclass
class Tally:
    """What a way to ask has taken in one run."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def costs(self) -> dict[str, float]:
        """Return the same as what is reported."""
        count = len(self.latencies)
        return {
            "requests per second": count / self.seconds,
            "p50 latency, ms": 1e3 * statistics.median(self.latencies),
            **{f"CPU per request of {name}, ms": 1e3 * cpu / count for name, cpu in self.cpu_s.items()},
        }


@dataclass(frozen=True)
class Stand:
    """What is measured.

    Attributes:
        pipe: of the load generator.
        processes: those whose CPU time counts.
        ways: to ask.
        new_tokens: how many every answer has.
    """

    pipe: Connection
    processes: dict[str, list[int]]
    ways: list[Way]
    new_tokens: int

    def take_turns(self, count: int, level: int, chance: random.Random, tallies: dict[str, Tally]) -> None:
        """Send as many requests in each way, so many in flight; add what it took."""
        order = chance.sample(self.ways, len(self.ways))  # whoever follows another may suffer from it
        for way in order:
            bodies = [to_json(way.body(chat)) for chat in conversations(count, chance)]
            before = {name: cpu_s(ids) for name, ids in self.processes.items()}
            self.pipe.send(Block(way.url, dict(way.headers), bodies, level))
            outcome: Outcome = self.pipe.recv()
            tally = tallies[way.name]
            for name, ids in self.processes.items():
                if way.ours or name != SERVER:
                    tally.cpu_s[name] += cpu_s(ids) - before[name]
            tally.seconds += outcome.seconds
            tally.latencies += outcome.latencies
            for answer in outcome.answers:
                if (sampled := way.count(from_json(answer))) != self.new_tokens:
                    raise RuntimeError(f"{way.name} sampled {sampled} tokens")


def compare(report: Report, stand: Stand, level: int, runs: int) -> None:
    """Measure all ways at one number of requests in flight."""
    turns, count = (16, 1) if level == 1 else (max(1, 16 // level), 2 * level)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in range(-1, runs):
        chance = random.Random(f"{level} {run}")
        tallies: dict[str, Tally] = {way.name: Tally() for way in stand.ways}
        for _ in range(turns):
            stand.take_turns(count, level, chance, tallies)
        if run < 0:
            continue  # connections were opened
        costs = {name: tally.costs() for name, tally in tallies.items()}
        rate, latency = costs[BASE]["requests per second"], costs[BASE]["p50 latency, ms"]
        for name, cost in costs.items():
            if name != BASE:
                cost["p50 latency more than SGLang chat, ms"] = cost["p50 latency, ms"] - latency
                cost["throughput, SGLang chat is 1"] = cost["requests per second"] / rate
            for what, value in cost.items():
                found[name, what].append(value)
    for (name, what), values in found.items():
        median = report.add(values, way=name, what=what, concurrent=f"{level} in flight")
        print(f"{level} in flight, {name}, {what}: {median:,.2f}", flush=True)


async def run(options: argparse.Namespace, report: Report) -> None:
    """Measure everything."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = never_ending(cached_tiny_policy(), Path(temporary) / "model")
        torch.set_num_threads(1)
        async with servers(folder, options.sglang_python, Path(temporary)) as (sglang, server):
            with load_generator() as (pipe, load):
                processes = {
                    SERVER: find("gym_sdk.cli"),
                    "SGLang": find("sglang.launch_server"),
                    "the load generator": [load],
                }
                asked = ways(sglang, server, folder, options.new_tokens)
                stand = Stand(pipe, processes, asked, options.new_tokens)
                for level in options.concurrent:
                    compare(report, stand, level, options.runs)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="of each answer; few show best what a request itself costs"
    )
    parser.add_argument("--runs", type=int, default=7, help="of each cell; the median counts")
    parser.add_argument(
        "--sglang-python",
        default=os.environ.get("GYM_SDK_SGLANG_PYTHON", ".venv-sglang/bin/python"),
        help="interpreter of an environment with SGLang (`make sglang-cpu` makes one)",
    )
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    options = parser.parse_args()
    settings = {"new tokens": options.new_tokens, "runs": options.runs, "note": NOTE}
    report = Report("This project's server beside SGLang's own", settings, ("gym-sdk", "aiohttp", "pydantic"))
    asyncio.run(run(options, report))
    report.show("way", "concurrent", "what")
    if options.output:
        report.write(options.output)


if __name__ == "__main__":
    main()
