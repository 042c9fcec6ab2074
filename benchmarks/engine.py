"""Throughput of the embedded engine beside transformers' own ways to generate, on one model.

Every system runs in a process of its own, and they take turns. All get the same requests and keep as many in
flight as the column says: a request that ends is replaced at once, so requests join and leave all the time.
The clock runs from the first request's submission to the last one's end, so prefill is included and start-up
is not. Prompts are random and differ between requests and runs, so nothing can be reused.

    make bench
    GOMP_SPINCOUNT=1000 python benchmarks/engine.py --quick --output engine.json
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import torch
from _report import Report
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from backends.engine import GenerationRequest, SamplingParams
from backends.transformers import EngineConfig, TransformersEngine
from backends.transformers.aside import aside

VOCAB = 360
LEAST_REQUESTS = 8


@dataclass(frozen=True)
class Job:
    """A prompt, and how many tokens to sample after it."""

    prompt: list[int]
    new: int


Run: TypeAlias = Callable[[Sequence[Job]], None]
System: TypeAlias = Callable[[PreTrainedModel, int], AbstractContextManager[Run]]


def build_model() -> PreTrainedModel:
    """A Qwen3 of 0.84 M parameters with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def fixed_jobs(count: int, chance: random.Random) -> list[Job]:
    return [Job(chance.choices(range(VOCAB), k=64), 64) for _ in range(count)]


def varied_jobs(count: int, chance: random.Random) -> list[Job]:
    return [
        Job(chance.choices(range(VOCAB), k=chance.randint(16, 112)), chance.randint(16, 112))
        for _ in range(count)
    ]


@contextmanager
def engine(model: PreTrainedModel, concurrent: int) -> Iterator[Run]:
    """The engine of this project, driven by as many asyncio tasks as requests are in flight."""
    embedded = TransformersEngine(model, config=EngineConfig(max_running=concurrent))

    async def drive(jobs: Sequence[Job]) -> None:
        queue = iter(enumerate(jobs))

        async def client() -> None:
            for number, job in queue:
                params = SamplingParams(max_new_tokens=job.new)
                result = await embedded.generate(GenerationRequest(str(number), job.prompt, params))
                assert len(result.token_ids) == len(result.log_probs) == job.new

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrent):
                group.create_task(client())

    with asyncio.Runner() as runner:
        yield lambda jobs: runner.run(drive(jobs))
        runner.run(embedded.aclose())


@contextmanager
def manager(model: PreTrainedModel, concurrent: int) -> Iterator[Run]:
    """Continuous batching of transformers, with log-probs."""
    config = GenerationConfig(do_sample=True, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(return_logprobs=True, num_blocks=1024, max_batch_tokens=2048)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching
    ) as running:

        def run(jobs: Sequence[Job]) -> None:
            in_flight: dict[str, Job] = {}
            queue = iter(jobs)

            def submit() -> None:
                job = next(queue, None)
                if job is not None:
                    in_flight[running.add_request(job.prompt, max_new_tokens=job.new)] = job

            for _ in range(concurrent):
                submit()
            while in_flight:
                result = running.get_result(timeout=60)
                assert result is not None, "no result for a minute"
                if result.is_finished():
                    job = in_flight.pop(result.request_id)
                    assert len(result.generated_tokens) == len(result.logprobs) == job.new
                    submit()

        yield run


@contextmanager
def generate(model: PreTrainedModel, concurrent: int) -> Iterator[Run]:
    """Static batches: nothing joins or leaves, and no log-probs are asked for."""

    def run(jobs: Sequence[Job]) -> None:
        for start in range(0, len(jobs), concurrent):
            batch = jobs[start : start + concurrent]
            ids = torch.tensor([job.prompt for job in batch])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=batch[0].new
            )
            assert output.shape[1] == ids.shape[1] + batch[0].new

    yield run


STATIC = "generate (static batch)"
SYSTEMS: dict[str, System] = {
    "gym-sdk engine": engine,
    "ContinuousBatchingManager": manager,
    STATIC: generate,
}
MakeJobs: TypeAlias = Callable[[int, random.Random], list[Job]]
WORKLOADS: dict[str, MakeJobs] = {"64 + 64 tokens": fixed_jobs, "16-112 + 16-112 tokens": varied_jobs}


def can_run(system: str, make_jobs: MakeJobs) -> bool:
    """Whether a system fits a workload: a static batch needs requests of one length."""
    return system != STATIC or make_jobs is fixed_jobs


def work(pipe: Connection, system: str, concurrent: int, threads: int) -> None:
    """Run one system in a process of its own: seconds for each batch of requests, until there is none."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    with SYSTEMS[system](aside(build_model), concurrent) as run:
        run(fixed_jobs(LEAST_REQUESTS, random.Random(-1)))
        pipe.send("ready")
        while jobs := pipe.recv():
            started = time.perf_counter()
            run(jobs)
            pipe.send(time.perf_counter() - started)


@contextmanager
def workers(systems: Sequence[str], concurrent: int, threads: int) -> Iterator[dict[str, Connection]]:
    """Start a process for each system: thread pools of one would slow the others in a shared process."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for system in systems:
        pipes[system], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, system, concurrent, threads)))
        processes[-1].start()
        theirs.close()
        assert pipes[system].recv() == "ready"
    try:
        yield pipes
    finally:
        for pipe in pipes.values():
            with suppress(BrokenPipeError):
                pipe.send(None)
        for process in processes:
            process.join(10)
            process.kill()


def measure(pipes: Mapping[str, Connection], batches: Sequence[Sequence[Job]]) -> dict[str, list[float]]:
    """Tokens per second of each system on each batch of requests; start-up and a warm-up are left out."""
    rates: dict[str, list[float]] = {name: [] for name in pipes}
    for jobs in batches:
        for name, pipe in pipes.items():  # in turn, so that other load on the machine hits all of them
            pipe.send(jobs)
            rates[name].append(sum(job.new for job in jobs) / pipe.recv())
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--runs", type=int, default=5, help="of each cell; the median counts")
    parser.add_argument("--rounds", type=int, default=2, help="requests of a run, for each one in flight")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--quick", action="store_true", help="2 runs of 1 round, up to 32 in flight")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/engine.json"))
    options = parser.parse_args()
    if options.quick:
        options.runs, options.rounds, options.concurrent = 2, 1, [1, 32]
    report = Report(
        "Generated tokens per second, prefill included",
        {
            "parameters": sum(parameter.numel() for parameter in build_model().parameters()),
            "threads": options.threads,
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"),
            "runs": options.runs,
            "requests in a run": f"{options.rounds} for each in flight, at least {LEAST_REQUESTS}",
        },
        packages=("gym-sdk", "torch", "transformers"),
    )
    for concurrent in options.concurrent:
        with workers(options.systems, concurrent, options.threads) as pipes:
            for workload, make_jobs in WORKLOADS.items():
                fitting = {name: pipe for name, pipe in pipes.items() if can_run(name, make_jobs)}
                count = max(LEAST_REQUESTS, options.rounds * concurrent)
                batches = [make_jobs(count, random.Random(run)) for run in range(options.runs)]
                for system, rates in measure(fitting, batches).items():
                    median = report.add(rates, workload=workload, concurrent=concurrent, system=system)
                    print(f"{workload}, {concurrent} in flight, {system}: {median:,.0f}", flush=True)
    report.show(rows="system", columns="concurrent", section="workload")
    report.write(options.output)


if __name__ == "__main__":
    main()
