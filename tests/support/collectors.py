"""Collectors of rollouts to be killed: a process that forks one for each line of its input.

Importing takes most of a collector's time, and a fork has everything imported already. Each says its process
id first, then a line for each group that is delivered, then `done`; and its parent how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gym_sdk.transport.http  # noqa: F401 (here, and not in each fork)
from gym_sdk import GymClient, Limits
from gym_sdk.rollout.signals import stop_on_signals
from support.bad_verifiers import never_done
from support.collecting import QUICK, look, questions, right
from support.scripted import ScriptedTransport, call, in_turn, say


async def collect(
    url: str,
    store: str,
    count: int,
    group_size: int,
    concurrency: int,
    in_processes: bool = False,
    stops_on_signals: bool = False,
) -> None:
    """Collect, and say so for each group."""
    async with AsyncExitStack() as stack:
        stop = await stack.enter_async_context(stop_on_signals()) if stops_on_signals else None
        client = await stack.enter_async_context(GymClient(url, retry=QUICK))
        stream = client.rollouts(
            questions(count),
            group_size=group_size,
            tools=[look],
            verifier=never_done if in_processes else right,
            limits=Limits(concurrency=concurrency),
            store=store,
        )
        async for group in await stack.enter_async_context(stream):
            acknowledged = [[*rollout.key, rollout.id] for rollout in group.rollouts]
            os.write(1, json.dumps(acknowledged).encode() + b"\n")
    said = "done" if stop is None or stop.signal is None else f"stopped by {stop.signal.name}"
    os.write(1, said.encode() + b"\n")


async def warm_up(folder: Path) -> None:
    """Have all parsers made, which are made when they are first used, here and not in each fork."""
    for _ in range(2):
        script = in_turn(call(("look", '{"number": 1}')), say("x"))
        async with GymClient.over(ScriptedTransport(script)) as client:
            await client.collect(questions(1), tools=[look], verifier=right, store=folder / "r.jsonl")


def main() -> None:
    """Fork a collector for each order."""
    with TemporaryDirectory() as folder:
        asyncio.run(warm_up(Path(folder)))
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.setsid()
            os.write(1, b"%d\n" % os.getpid())
            try:
                asyncio.run(collect(**json.loads(line)))
            except KeyboardInterrupt:
                os.write(1, b"interrupted\n")
            finally:
                sys.stdout.flush()
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, b"killed\n" if status == -signal.SIGKILL else b"ended with %d\n" % status)


@contextmanager
def collectors() -> Iterator[subprocess.Popen[bytes]]:
    """Start the process; end it, and its forks, in the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-m", "support.collectors"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        bufsize=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def output_of(process: subprocess.Popen[bytes]) -> AsyncIterator[asyncio.StreamReader]:
    """Read what the process and its forks write, line by line."""
    assert process.stdout is not None
    reader = asyncio.StreamReader(limit=2**20)
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stdout
    )
    with contextlib.closing(pipe):
        yield reader


def order(process: subprocess.Popen[bytes], **fields: Any) -> None:
    """Have a collector started."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(fields).encode() + b"\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
