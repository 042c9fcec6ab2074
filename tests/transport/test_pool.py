"""The connections of model calls: answers in any pieces, reuse, TLS, what nobody asked for."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from support.faulty_server import HOLD, READ, answer, listening
from yarl import URL

from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.schema import ResponseRequest
from gym_sdk.transport.connection import Connection, HangUpError, WireAnswer
from gym_sdk.transport.http import HttpTransport
from gym_sdk.transport.pacing import Pacer
from gym_sdk.transport.pool import ConnectionPool

OK: dict[str, Any] = {"id": "resp_1", "created_at": 1.0, "model": "policy", "output": []}
REQUEST = b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
LIMITS: dict[str, Any] = {"connect_s": 5.0, "stall_s": 5.0, "most_bytes": 1000, "most_connections": 8}


class Pipe(asyncio.Transport):
    """Takes what is written, and closes when told."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


def connected() -> tuple[Connection, Pipe]:
    connection, pipe = Connection("here", most_bytes=1000, stall_s=5.0, pacer=Pacer()), Pipe()
    connection.connection_made(pipe)
    return connection, pipe


async def exchanged(pieces: list[bytes], *, closes: bool) -> tuple[WireAnswer, Connection]:
    connection, pipe = connected()
    task = asyncio.ensure_future(connection.exchange(REQUEST))
    await asyncio.sleep(0)
    assert pipe.written == REQUEST
    for piece in pieces:
        assert not task.done()
        connection.data_received(piece)
    if closes:
        connection.connection_lost(None)
    return await asyncio.wait_for(task, 5), connection


SIZED = b"HTTP/1.1 200 OK\r\nX-Name: V\xe4lue\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nX-Name: end\r\n\r\n"
)
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nX-Name: end\r\n\r\nhello"
WITH_HINT = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + SIZED
GZIPPED = zlib.compress(b"hello", wbits=31)
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(GZIPPED) + GZIPPED


@given(
    data=st.sampled_from([SIZED, CHUNKED, UNTIL_CLOSED, WITH_HINT, PACKED]),
    cuts=st.lists(st.integers(1, 120), max_size=6),
)
def test_an_answer_is_the_same_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    bounds = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    pieces = [data[start:end] for start, end in itertools.pairwise(bounds)]
    found, connection = asyncio.run(exchanged(pieces, closes=data == UNTIL_CLOSED))
    assert (found.status, found.body) == (200, b"hello")
    assert connection.is_closed == (data == UNTIL_CLOSED)


@given(data=st.sampled_from([SIZED, CHUNKED, WITH_HINT]), cut=st.integers(0, 200))
def test_an_answer_that_is_cut_is_none(data: bytes, cut: int) -> None:
    cut %= len(data)
    with pytest.raises(HangUpError) as caught:
        asyncio.run(exchanged([data[:cut]] if cut else [], closes=True))
    assert caught.value.is_answered == (cut > data.find(b"\r\n\r\n", data.find(b" 200 ")) + 3)


@pytest.mark.asyncio
async def test_what_nobody_asked_for_closes_the_connection() -> None:
    _, connection = await exchanged([SIZED], closes=False)
    connection.data_received(SIZED)
    assert connection.is_closed
    found, connection = await exchanged([SIZED + SIZED], closes=False)
    assert found.body == b"hello"
    assert connection.is_closed


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", "more than 1000 bytes"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 1500,
            "more than 1000 bytes",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx", "encoding 'br'"),
    ],
)
async def test_what_cannot_be_read(data: bytes, message: str) -> None:
    with pytest.raises(TransportError, match=message):
        await exchanged([data], closes=False)


@asynccontextmanager
async def pool_for(url: str, **options: Any) -> AsyncIterator[ConnectionPool]:
    pool = ConnectionPool(URL(url), **LIMITS | options)
    try:
        yield pool
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_connections_are_used_again_and_closed_when_they_lie_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gym_sdk.transport.pool._IDLE_S", 0.05)
    async with listening([READ, answer(OK)] * 3 + [HOLD]) as server, pool_for(server.url) as pool:
        for _ in range(3):
            assert (await pool.exchange(REQUEST)).status == 200
        assert (server.connections, server.open) == (1, 1)
        while server.open:
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_closed_pool_sends_nothing() -> None:
    async with listening([READ, HOLD]) as server, pool_for(server.url) as pool:
        under_way = asyncio.ensure_future(pool.exchange(REQUEST))
        while not server.seen:
            await asyncio.sleep(0.001)
        pool.close()
        with pytest.raises(TransportError):
            await under_way
        with pytest.raises(ConfigurationError, match="not open"):
            await pool.exchange(REQUEST)


@pytest.mark.asyncio
async def test_tls_and_a_certificate_that_nobody_vouches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer(OK))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        transport = HttpTransport(url)
        await transport.open()
        with pytest.raises(TransportError, match="certificate") as caught:
            await transport.respond(ResponseRequest(input="q"))
        assert not caught.value.retryable
        await transport.aclose()

        bundle = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(bundle))
        monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
        transport = HttpTransport(url)
        await transport.open()
        assert (await transport.respond(ResponseRequest(input="q"))).id == "resp_1"
        await transport.aclose()
    assert f"Host: {url[8:-3]}\r\n".encode() in heads[0]


@pytest.mark.parametrize("headers", [{"X-Bad": "a\r\nHost: evil"}, {"X Bad:": "1"}])
def test_headers_that_would_be_others(headers: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="header"):
        HttpTransport("http://localhost:1/v1", headers=headers)
