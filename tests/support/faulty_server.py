"""A server at the level of bytes: it does to each connection what a script says, down to the reset."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

__all__ = ["HOLD", "READ", "RESET", "FaultyServer", "Seen", "Step", "answer", "free_port", "listening"]


@dataclass(frozen=True)
class _Mark:
    name: str


READ = _Mark("read")
"""Read one request, head and body. A connection that ends instead ends the script."""
RESET = _Mark("reset")
"""Close the connection with a reset, at once."""
HOLD = _Mark("hold")
"""Do nothing until the peer closes the connection."""

Step = _Mark | bytes | float | asyncio.Event | Callable[["Seen"], bytes]
"""A mark, bytes to send, seconds to wait, an event to wait for, or what makes bytes of the last request."""

Script = Sequence[Step]


@dataclass
class Seen:
    """A request that was read."""

    connection: int
    head: bytes
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines if line)
        return {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()


@dataclass
class FaultyServer:
    """Gives the n-th connection the n-th script, and those after the last script the last one.

    A connection is closed when its script is over. Scripts may be replaced at any time.
    """

    scripts: list[Script]
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    port: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self.connections += 1
        self.open += 1
        try:
            for step in self.scripts[min(number, len(self.scripts) - 1)]:
                if not await self._do(step, number, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _do(
        self, step: Step, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if step is READ:
            self.seen.append(await _read(number, reader))
        elif step is RESET:
            opened: Any = writer.get_extra_info("socket")
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        elif step is HOLD:
            while await reader.read(65536):
                pass
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, float | int):
            await asyncio.sleep(step)
        else:
            writer.write(step(self.seen[-1]) if callable(step) else bytes(step))  # type: ignore[arg-type]
            await writer.drain()
        return True


async def _read(number: int, reader: asyncio.StreamReader) -> Seen:
    head = await reader.readuntil(b"\r\n\r\n")
    seen = Seen(number, head, b"")
    seen.body = await reader.readexactly(int(seen.headers.get("content-length", 0)))
    return seen


def answer(
    body: Any = b"",
    *,
    status: str = "200 OK",
    length: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Return an HTTP answer.

    Args:
        body: bytes, or what is written as JSON.
        status: code and reason.
        length: what Content-Length says, if not the truth; -1 leaves the header out.
        headers: further ones.
    """
    data = body if isinstance(body, bytes) else to_json(body)
    fields = {"Content-Type": "application/json", **(headers or {})}
    if length != -1:
        fields["Content-Length"] = str(len(data) if length is None else length)
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + data


@asynccontextmanager
async def listening(
    *scripts: Script, port: int = 0, server: FaultyServer | None = None
) -> AsyncIterator[FaultyServer]:
    """Listen on loopback for as long as the context lasts; then every connection is reset.

    Args:
        *scripts: of the connections, in order.
        port: where to listen; any free port by default.
        server: one that goes on, at its port, as after a restart.
    """
    faulty = server or FaultyServer(list(scripts))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        faulty.tasks.add(task)
        try:
            await faulty.handle(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            faulty.tasks.discard(task)

    listener = await asyncio.start_server(handle, "127.0.0.1", port or faulty.port, limit=2**24)
    faulty.port = listener.sockets[0].getsockname()[1]
    try:
        yield faulty
    finally:
        listener.close()
        for task in list(faulty.tasks):
            task.cancel()
        while faulty.tasks:
            await asyncio.sleep(0)
        with suppress(Exception):
            await listener.wait_closed()


@contextmanager
def free_port() -> Iterator[int]:
    """Yield a port at which nobody listens, for as long as the context lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
