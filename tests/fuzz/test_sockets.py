"""Clients that break off anywhere, and bytes that are no HTTP: they cost nobody but themselves anything."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import Target, fuzz_settings

pytestmark = pytest.mark.slow

_QUIET_S = 0.1
"""A server that says nothing for this long is left alone."""


_EMPTY = b"Content-Length: 2\r\n\r\n{}"
_TO_MODEL = b"POST /v1/responses HTTP/1.1\r\nHost: a\r\n"


def _post(path: str, **body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _chunked(request: bytes) -> bytes:
    head, _, data = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    pieces = [data[:10], data[10:]]
    return (
        head
        + b"\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        + b"0\r\n\r\n"
    )


_MESSAGES = [{"role": "user", "content": "1"}]
_LONG = [  # more tokens than anybody waits for
    _post("/v1/responses", input="1", stream=True),
    _post("/v1/responses", input="1"),
    _post("/v1/responses", input="1", background=True, stream=True, max_output_tokens=8),
    _post("/v1/chat/completions", messages=_MESSAGES, stream=True, n=3),
    _post("/v1/completions", prompt="1", stream=True),
    _post("/v1/messages", model="policy", messages=_MESSAGES, stream=True, max_tokens=200),
    _chunked(_post("/v1/responses", input="1", stream=True)),
]
_GOOD = [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", _post("/v1/responses", input="1", max_output_tokens=2)]
_BAD = [
    *(b"\r\n", b"\x00" * 100, b"\xff\xfe", b"GET /health\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x42" * 64,  # TLS
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"b" * 70_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: b\r\n" * 40_000 + b"\r\n",
    b"GET /%zz%00?\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET //[::1]:99999/ HTTP/1.1\r\nHost: \xc3\xa9\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    _TO_MODEL + b"Content-Length: -1\r\n\r\n{}",
    _TO_MODEL + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    _TO_MODEL + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    _TO_MODEL + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}",
    _TO_MODEL + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
    _TO_MODEL + b"Transfer-Encoding: gzip\r\n" + _EMPTY,
    _TO_MODEL + b"Content-Encoding: gzip\r\n" + _EMPTY,
    _TO_MODEL + b"Content-Encoding: what\r\n" + _EMPTY,
    _TO_MODEL + b"Expect: 100-continue\r\n" + _EMPTY,
    _TO_MODEL + b"Expect: what\r\n" + _EMPTY,
    _TO_MODEL + b"Content-Type: a/b; charset=what\r\n" + _EMPTY,
    _TO_MODEL + b"Upgrade: websocket\r\nConnection: Upgrade\r\n" + _EMPTY,
]

_Leave = Literal["close", "reset", "half-close"]


@contextmanager
def _connected(server: Target) -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        yield connection


def _read(connection: socket.socket, most: int | None = None) -> bytes:
    """Read until the server is quiet or closes, or so much has come."""
    data = b""
    connection.settimeout(_QUIET_S)
    with suppress(TimeoutError, ConnectionError):
        while (most is None or len(data) < most) and (piece := connection.recv(65_536)):
            data += piece
    return data


def _send(connection: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError):  # it may not want to read all of it
        connection.sendall(data)


def _check(data: bytes) -> None:
    """Check that there are only answers, and none that blames the server."""
    statuses = [int(status) for status in re.findall(rb"HTTP/\d\.\d (\d{3}) ", data)]
    assert all(status < 500 for status in statuses), data
    assert not data or statuses, data


@given(
    request=st.sampled_from(_LONG),
    sent=st.floats(0, 1),
    read=st.sampled_from([0, 0, 1, 300, 1500, 4000]),
    leave=st.sampled_from(["close", "reset", "half-close"]),
)
@fuzz_settings(60)
def attack_by_leaving(server: Target, request: bytes, sent: float, read: int, leave: _Leave) -> None:
    with _connected(server) as connection:
        _send(connection, request[: round(sent * len(request))])
        if read:
            _check(_read(connection, read))
        if leave == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif leave == "half-close":
            connection.shutdown(socket.SHUT_WR)
            _read(connection)


@given(pieces=st.lists(st.sampled_from(_GOOD + _BAD) | st.binary(max_size=50), min_size=1, max_size=4))
@fuzz_settings(60)
def attack_by_garbage(server: Target, pieces: list[bytes]) -> None:
    with _connected(server) as connection:
        _send(connection, b"".join(pieces))
        _check(_read(connection))


@given(request=st.sampled_from(_GOOD + _BAD), data=st.data())
@fuzz_settings(60)
def attack_by_flaws(server: Target, request: bytes, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        place, size = data.draw(st.integers(0, min(len(request), 300))), data.draw(st.integers(0, 3))
        request = request[:place] + data.draw(st.binary(max_size=3)) + request[place + size :]
    with _connected(server) as connection:
        _send(connection, request)
        _check(_read(connection))


@pytest.mark.parametrize("attack", [attack_by_leaving, attack_by_garbage, attack_by_flaws])
def test_a_server_stands(server: Target, attack: object) -> None:
    assert callable(attack)
    attack(server)
    server.check_health()
