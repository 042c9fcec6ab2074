"""What every measured program shares: it is told orders on stdin, and says on stdout what each one cost.

Only the standard library, because the programs live in environments of their own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

QUESTION = "What is 2 + 3?"
TICK_S = 0.01


@dataclass(frozen=True)
class Order:
    """What to do.

    Attributes:
        url: the API's root.
        rollouts: how many.
        concurrency: how many at once.
        model_calls: most model calls at once; None for as many as there are rollouts.
        keep: whether to hold on to all rollouts, as who collects them does; a trainer lets them go.
        store: file to which rollouts are appended.
        cancel: leave when all are in flight, instead of waiting for them.
        profile: return where the time goes.
        json: with no server, whether requests and responses are still written and read.
        gc_threshold: new objects between two collections of garbage, what was imported being left out; None
            for Python's defaults.
    """

    url: str
    rollouts: int
    concurrency: int
    model_calls: int | None = None
    keep: bool = False
    store: str | None = None
    cancel: bool = False
    profile: bool = False
    json: bool = False
    gc_threshold: int | None = None


@dataclass
class Cost:
    """What an order cost; a context manager around what counts.

    Attributes:
        seconds: wall clock.
        cpu_s: of this process, all threads.
        peak_rss_mib: most memory during the order, as resident pages.
        lag_p50_ms: how late a timer was that was due at any moment; so are the others.
        more: what only some orders measure.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_rss_mib: float = 0.0
    lag_p50_ms: float = 0.0
    lag_p99_ms: float = 0.0
    lag_max_ms: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Cost:
        self.seconds -= time.perf_counter()
        self.cpu_s -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time()
        self.seconds += time.perf_counter()


async def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


def check(scores: list[float], rollouts: int) -> None:
    """Refuse a run in which not every rollout was answered right."""
    if len(scores) != rollouts or set(scores) != {1.0}:
        raise RuntimeError(f"{len(scores)} of {rollouts} rollouts ended, {scores.count(1.0)} with reward 1.0")


@asynccontextmanager
async def lag_into(cost: Cost) -> AsyncIterator[None]:
    """Measure how late the event loop is, by a ticker.

    Ticks that a busy loop missed count too: a lag of 100 ms made ten timers late, by 100, 90, ... ms.
    """
    lags: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            late = max(0.0, time.perf_counter() - due)
            lags.extend(late - TICK_S * missed for missed in range(int(late / TICK_S) + 1))

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()
        lags.sort()
        if lags:
            cost.lag_p50_ms = 1e3 * lags[len(lags) // 2]
            cost.lag_p99_ms = 1e3 * lags[int(0.99 * (len(lags) - 1))]
            cost.lag_max_ms = 1e3 * lags[-1]


def peak_rss_mib() -> float:
    """Return the most memory that this process has had since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Let the peak begin anew, where the system allows that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def serve(job: Callable[[Order, Cost], Awaitable[None]]) -> None:
    """Carry out the orders on stdin, one a line, each in an event loop of its own."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    async def carry_out(order: Order, cost: Cost) -> None:
        async with lag_into(cost):
            await job(order, cost)

    for line in sys.stdin:
        order, cost = Order(**json.loads(line)), Cost()
        if order.gc_threshold is not None:
            gc.collect()
            gc.freeze()
            gc.set_threshold(order.gc_threshold, 20, 100)
        forget_peak()
        asyncio.run(carry_out(order, cost))
        cost.peak_rss_mib = peak_rss_mib()
        answers.write(json.dumps(asdict(cost)) + "\n")
        answers.flush()
