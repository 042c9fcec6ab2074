"""A scripted policy behind HTTP, in a process of its own: as little server as there can be.

It answers `POST /v1/responses` and `POST /v1/chat/completions`: first with a call of `add(2, 3)`, and once it
is told the tool's output, with the final message. A request with the header `Gym-Token-Form: compact` gets
tokens in that form. `POST /script` sets the latency and clears the counts, `GET /stats` returns them. A
connection that closes while its answer is due is an aborted generation. All times are of `time.monotonic`,
which is one clock for all processes of a machine.

    python benchmarks/_scripted.py
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _answers import ANSWERS, Answer

LISTENERS = 4
"""Sockets that listen on the one port: each has an accept queue of its own, of at most net.core.somaxconn."""


@dataclass
class Stats:
    """What the server has seen since its script was set; connections that only ask for this don't count."""

    open: int = 0
    """Connections open now."""
    requests: int = 0
    in_flight: int = 0
    """Answers that are due now."""
    most_in_flight: int = 0
    aborted: int = 0
    """Answers that were due when their connection closed."""
    resets: int = 0
    """Connections that ended with an error."""
    last_abort_at: float = 0.0
    last_close_at: float = 0.0


@dataclass
class Script:
    """How the server behaves, and what it has seen."""

    latency_s: float = 0.0
    stats: Stats = field(default_factory=Stats)
    number: int = 0
    """Makes the ids of responses differ."""

    def restart(self, latency_s: float) -> None:
        """Set the latency and clear the counts, except for what is open and in flight."""
        self.latency_s = latency_s
        self.stats = Stats(open=self.stats.open, in_flight=self.stats.in_flight)


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, for bodies whose length is given."""

    def __init__(self, script: Script, loop: asyncio.AbstractEventLoop) -> None:
        self._script = script
        self._loop = loop
        self._buffer = b""
        self._due: deque[asyncio.TimerHandle] = deque()
        self._counted = True
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._script.stats.open += 1

    def connection_lost(self, error: Exception | None) -> None:
        """Abort what was due."""
        if not self._counted:
            return
        stats, now = self._script.stats, time.monotonic()
        stats.open -= 1
        stats.resets += error is not None
        stats.last_close_at = now
        if self._due:
            stats.in_flight -= len(self._due)
            stats.aborted += len(self._due)
            stats.last_abort_at = now
            for handle in self._due:
                handle.cancel()
            self._due.clear()

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._buffer = self._buffer + data if self._buffer else data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = _content_length(head)
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        target = head.split(b" ", 2)[1]
        answer = ANSWERS.get((target, b"gym-token-form: compact" in head))
        if answer is None:
            self._control(target, body)
            return
        script = self._script
        script.number += 1
        script.stats.requests += 1
        data = answer.data(script.number, body)
        if not script.latency_s:
            self._transport.write(data)
            return
        script.stats.in_flight += 1
        script.stats.most_in_flight = max(script.stats.most_in_flight, script.stats.in_flight)
        self._due.append(self._loop.call_later(script.latency_s, self._send, data))

    def _send(self, data: bytes) -> None:
        self._due.popleft()  # all answers of a connection take equally long: the first asked is the first due
        self._script.stats.in_flight -= 1
        self._transport.write(data)

    def _control(self, target: bytes, body: bytes) -> None:
        if self._counted:
            self._counted = False
            self._script.stats.open -= 1
        if target == b"/script":
            self._script.restart(json.loads(body)["latency_s"])
        elif target != b"/stats":
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        self._transport.write(Answer.http(json.dumps(asdict(self._script.stats)).encode()))


def _content_length(head: bytes) -> int:
    start = head.find(b"\r\ncontent-length:")
    if start < 0:
        return 0
    end = head.find(b"\r\n", start + 17)
    return int(head[start + 17 : end if end >= 0 else None])


async def serve() -> None:
    """Serve on a free port of loopback, say which on stdout, and end when stdin does."""
    loop, script = asyncio.get_running_loop(), Script()
    port = 0
    for _ in range(LISTENERS):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", port))
        port = listener.getsockname()[1]
        await loop.create_server(lambda: Connection(script, loop), sock=listener, backlog=16384)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


@dataclass(frozen=True)
class ScriptedServer:
    """A running server."""

    root_url: str
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        """The API's root."""
        return f"{self.root_url}/v1"

    def script(self, latency_s: float) -> None:
        """Set the latency and clear the counts."""
        self._ask("/script", json.dumps({"latency_s": latency_s}).encode())

    def stats(self) -> Stats:
        """Return the counts."""
        return Stats(**self._ask("/stats"))

    def _ask(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        with urllib.request.urlopen(self.root_url + path, data=body, timeout=30) as answer:
            content: dict[str, Any] = json.load(answer)
            return content


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Start a server; stop it in the end."""
    pipe = subprocess.PIPE
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            yield ScriptedServer(f"http://127.0.0.1:{int(process.stdout.readline())}", process)
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(serve())
