"""Two thousand streams at once from a server process: none is dropped or left over, and memory stays."""

from __future__ import annotations

import json
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import psutil
import pytest

from gym_sdk.launch import launch_server

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(300)]

STREAMS = 2000
NEW_TOKENS = 16
MIB = 2**20

# Measured: 150 MiB, which are 75 KiB a stream (its socket, parser, tasks, tokens), and the engine's cache.
PEAK_MIB = 300
"""By how much 2,000 streams at once may grow the server."""

# Measured: 5 MiB, for the 1,000 calls that are remembered. 30 KiB lost for each dropped stream were 30 MiB.
ROUND_MIB = 20
"""By how much a round of 1,000 whole and 1,000 dropped streams may grow it for good."""


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process, and the server that it starts, have enough files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = STREAMS + 512
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{hard} files may be open here (ulimit -Hn); {STREAMS} connections need {wanted}")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class Server:
    """A server process, and a client of it."""

    url: str
    process: psutil.Process
    session: aiohttp.ClientSession
    peak_mib: float = 0.0

    @property
    def memory_mib(self) -> float:
        return self.process.memory_info().rss / MIB

    @property
    def connections(self) -> int:
        """How many it has, apart from those that are only waited for by the kernel."""
        gone = {psutil.CONN_LISTEN, psutil.CONN_TIME_WAIT, psutil.CONN_NONE}
        return sum(connection.status not in gone for connection in self.process.net_connections("tcp"))

    @asynccontextmanager
    async def stream(self, number: int) -> AsyncIterator[aiohttp.ClientResponse]:
        body = {"input": f"{number} + 7 =", "max_output_tokens": NEW_TOKENS, "stream": True, "store": False}
        async with self.session.post(f"{self.url}/responses", json=body) as answer:
            assert answer.status == 200, await answer.text()
            yield answer

    async def read(self, number: int) -> None:
        """Read a stream to its end, and check that it is whole."""
        async with self.stream(number) as answer:
            blocks = (await answer.text()).removesuffix("\n\n").split("\n\n")
        blocks = [block for block in blocks if block != ": keep-alive"]
        assert blocks.pop() == "data: [DONE]"
        events: list[Any] = [json.loads(block.partition("\ndata: ")[2]) for block in blocks]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[0]["type"] == "response.created"
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        response = events[-1]["response"]
        assert len(response["output"][-1]["generation_token_ids"]) == response["usage"]["output_tokens"]
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        parts = [part for item in response["output"] for part in item["content"]]
        assert "".join(deltas) == "".join(part["text"] for part in parts if part["type"] == "output_text")

    async def drop(self, number: int) -> None:
        """Leave a stream in the middle."""
        async with self.stream(number) as answer:
            async for line in answer.content:
                if b".delta" in line:
                    break
            answer.close()

    async def watch(self) -> None:
        """Note how much memory it takes at most, until cancelled."""
        while True:
            self.peak_mib = max(self.peak_mib, self.memory_mib)
            await anyio.sleep(0.05)

    async def check_idle(self) -> None:
        """Wait until nothing is left of any stream."""
        with anyio.fail_after(30):
            while await self._in_flight() or self.connections:
                await anyio.sleep(0.1)

    async def _in_flight(self) -> int:
        async with self.session.get(self.url.removesuffix("/v1") + "/health") as answer:
            health = await answer.json()
        return int(health["running"] + health["waiting"])


@asynccontextmanager
async def served(policy: Path, log: Path) -> AsyncIterator[Server]:
    """Run a server until the context is left."""
    async with launch_server(policy, arguments=["--threads", "1"], log=log) as url:
        process = next(child for child in psutil.Process().children() if "gym_sdk.cli" in child.cmdline())
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        ) as session:
            server = Server(url, process, session)
            for number in range(8):  # torch and the allocator warm up
                await server.read(number)
            yield server


async def test_two_thousand_streams_are_all_whole(
    tiny_policy: Path, tmp_path: Path, many_files: None
) -> None:
    async with served(tiny_policy, tmp_path / "server.log") as server:
        before = server.memory_mib
        async with anyio.create_task_group() as watching:
            watching.start_soon(server.watch)
            async with anyio.create_task_group() as streams:
                for number in range(STREAMS):
                    streams.start_soon(server.read, number)
            watching.cancel_scope.cancel()
        await server.check_idle()
        assert server.peak_mib - before < PEAK_MIB


async def test_streams_that_are_dropped_leave_nothing(
    tiny_policy: Path, tmp_path: Path, many_files: None
) -> None:
    async with served(tiny_policy, tmp_path / "server.log") as server:
        after = []
        for _ in range(3):  # the first one grows what is kept for the others
            async with anyio.create_task_group() as streams:
                for number in range(STREAMS):
                    streams.start_soon(server.drop if number % 2 else server.read, number)
            await server.check_idle()
            after.append(server.memory_mib)
        assert after[-1] - after[0] < 2 * ROUND_MIB, after
