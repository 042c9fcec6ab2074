"""A load generator that reads answers whole and as streams."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import aiohttp
from pydantic_core import from_json

_T = TypeVar("_T")


@dataclass(frozen=True)
class Block:
    """Requests that the load generator sends as fast as they are answered."""

    url: str
    bodies: list[bytes]
    concurrent: int


@dataclass(frozen=True)
class Outcome:
    """What became of a block: times in seconds, and the tokens that were sampled."""

    seconds: float
    latencies: list[float]
    first_deltas: list[float]
    tokens: int


async def timed(items: Sequence[_T], concurrent: int, send: Callable[[_T], Awaitable[None]]) -> Outcome:
    """Send as many requests as there are items, so many in flight."""
    queue = iter(items)
    latencies: list[float] = []

    async def client() -> None:
        for item in queue:
            started = time.perf_counter()
            await send(item)
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrent):
            group.create_task(client())
    return Outcome(time.perf_counter() - started, latencies, [], 0)


async def drive(pipe: Connection) -> None:
    """Send blocks of requests until there is none."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Content-Type": "application/json"},
    ) as session:
        while block := pipe.recv():
            pipe.send(await send_block(session, block))


async def send_block(session: aiohttp.ClientSession, block: Block) -> Outcome:
    """Send one block."""
    answers: list[bytes] = []
    first_deltas: list[float] = []

    async def send(body: bytes) -> None:
        started, first, data = time.perf_counter(), None, b""
        async with session.post(block.url, data=body) as answer:
            async for piece in answer.content.iter_any():
                data += piece
                if first is None and b".delta" in piece:
                    first = time.perf_counter() - started
        if answer.status != 200:
            raise RuntimeError(f"{block.url} answered {answer.status}: {data[:300]!r}")
        if first is not None:
            first_deltas.append(first)
        answers.append(data)

    outcome = await timed(block.bodies, block.concurrent, send)
    tokens = sum(map(sampled_tokens, answers))
    return Outcome(outcome.seconds, outcome.latencies, first_deltas, tokens)


def sampled_tokens(answer: bytes) -> int:
    """Return how many tokens an answer says that it has sampled."""
    datas = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")] or [answer]
    for data in reversed(datas):
        body = from_json(data)
        usage = body.get("response", body).get("usage")
        if usage:
            return int(usage.get("output_tokens", usage.get("completion_tokens")))
    raise RuntimeError(f"an answer without usage: {answer[:300]!r}")


def generate_load(pipe: Connection) -> None:
    """Be the load generator, in a process of its own."""
    asyncio.run(drive(pipe))


@contextmanager
def load_generator() -> Iterator[Connection]:
    """Start the load generator; yield its pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=generate_load, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        with suppress(BrokenPipeError):
            here.send(None)
        process.join(10)
        process.kill()
