"""The HTTP transport against servers that break off, stall, or answer nonsense, at the level of bytes."""

from __future__ import annotations

import asyncio
import errno
import gzip
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.faulty_server import HOLD, READ, RESET, FaultyServer, Seen, Step, answer, free_port, listening
from support.held import until

from gym_sdk.errors import ConfigurationError, PolicyError, TransportError
from gym_sdk.schema import Response, ResponseRequest
from gym_sdk.transport import connections
from gym_sdk.transport.connections import allowed_connections
from gym_sdk.transport.faults import Fault, fault_of
from gym_sdk.transport.http import HttpTransport, http_transports

pytestmark = pytest.mark.asyncio

OK: dict[str, Any] = {
    "id": "resp_1",
    "created_at": 1.0,
    "model": "policy",
    "output": [{"type": "message", "role": "assistant", "content": "hi"}],
}
ASK = ResponseRequest(input="q")


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(url, **options)
    await transport.open()
    try:
        yield transport
    finally:
        await transport.aclose()


async def failure_of(server: FaultyServer, **options: Any) -> TransportError:
    async with opened(server.url, **options) as transport:
        with pytest.raises(TransportError) as caught:
            await transport.respond(ASK)
    return caught.value


GZIP = {"Content-Encoding": "gzip"}
WHOLE = answer(OK)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "script",
    [
        [READ],
        [READ, RESET],
        [RESET],
        [READ, WHOLE[:20]],
        [READ, WHOLE[:-10]],
        [READ, WHOLE[:-10], 0.02, RESET],
        [READ, answer(OK, length=10_000)],
        [READ, CHUNKED + b'5\r\n{"id"\r\n'],
        [READ, CHUNKED + b"5\r\n[1,2"],
        [READ, CHUNKED + b"no size\r\n"],
        [READ, answer(b'{"id": "resp_1", "outp')],
        [READ, answer(b"<html>starting</html>")],
        [READ, answer(b"")],
        [READ, answer(OK, headers=GZIP)],
        [READ, answer(gzip.compress(b"x" * 1000)[:-12], headers=GZIP)],
        [READ, b"\x16\x03\x01 this is no HTTP\r\n\r\n"],
    ],
    ids=str,
)
async def test_an_answer_that_is_cut_or_garbled_may_be_asked_for_again(script: list[Step]) -> None:
    async with listening(script) as server:
        failure = await failure_of(server)
    assert failure.retryable
    assert fault_of(failure) is Fault.BROKEN
    assert server.url in str(failure)
    assert server.connections == 1  # on a connection that was opened for it, nothing is tried again


@pytest.mark.parametrize(
    ("status", "headers", "retryable", "after_s", "fault"),
    [
        ("408 Request Timeout", {}, True, None, Fault.PASSING),
        ("409 Conflict", {}, True, None, Fault.PASSING),
        ("425 Too Early", {}, True, None, Fault.PASSING),
        ("429 Too Many Requests", {}, True, None, Fault.BUSY),
        ("429 Too Many Requests", {"Retry-After": "7"}, True, 7.0, Fault.BUSY),
        ("500 Internal Server Error", {}, True, None, Fault.BROKEN),
        ("502 Bad Gateway", {"Retry-After": "soon"}, True, None, Fault.BROKEN),
        ("503 Service Unavailable", {"Retry-After": "-3"}, True, 0.0, Fault.BROKEN),
        ("503 Service Unavailable", {"Retry-After": "inf"}, True, 3600.0, Fault.BROKEN),
        ("503 Service Unavailable", {"Retry-After": "nan"}, True, 0.0, Fault.BROKEN),
        ("504 Gateway Timeout", {}, True, None, Fault.BROKEN),
        ("301 Moved Permanently", {"Location": "http://else.where/v1"}, False, None, Fault.FINAL),
        ("300 Multiple Choices", {}, False, None, Fault.FINAL),
    ],
)
async def test_statuses(
    status: str, headers: dict[str, str], retryable: bool, after_s: float | None, fault: Fault
) -> None:
    async with listening(
        [READ, answer({"error": {"message": "no"}}, status=status, headers=headers)]
    ) as server:
        failure = await failure_of(server)
    assert failure.status == int(status[:3])
    assert (failure.retryable, failure.retry_after_s, fault_of(failure)) == (retryable, after_s, fault)
    assert headers.get("Location", "") in str(failure)


async def test_a_date_counts_by_the_servers_own_clock() -> None:
    dates = {"Date": "Mon, 01 Jan 2001 10:00:00 GMT", "Retry-After": "Mon, 01 Jan 2001 10:00:09 GMT"}
    async with listening([READ, answer(status="503 Busy", headers=dates)]) as server:
        assert (await failure_of(server)).retry_after_s == 9.0
    del dates["Date"]
    async with listening([READ, answer(status="503 Busy", headers=dates)]) as server:
        assert (await failure_of(server)).retry_after_s is None


async def test_an_empty_success_and_one_of_another_code() -> None:
    async with listening([READ, b"HTTP/1.1 204 No Content\r\n\r\n"]) as server:
        assert (await failure_of(server)).retryable
    async with listening([READ, answer(OK, status="201 Created")]) as server, opened(server.url) as transport:
        assert (await transport.respond(ASK)).id == "resp_1"


async def test_silence_is_a_failure_only_in_the_middle_of_an_answer() -> None:
    async with listening([READ, 0.3, WHOLE]) as server, opened(server.url, body_stall_s=0.1) as transport:
        assert (await transport.respond(ASK)).id == "resp_1"
    slow: list[Step] = [READ, WHOLE[:-30], 0.15, WHOLE[-30:-20], 0.15, WHOLE[-20:]]
    async with listening(slow) as server, opened(server.url, body_stall_s=5.0) as transport:
        assert (await transport.respond(ASK)).id == "resp_1"
    async with listening([READ, WHOLE[:-30], HOLD]) as server:
        failure = await failure_of(server, body_stall_s=0.05)
        assert "nothing for 0.05 s" in str(failure)
        assert fault_of(failure) is Fault.BROKEN
        await until(lambda: server.open == 0)


@pytest.mark.parametrize(
    "head",
    [answer(b"", length=10**9), CHUNKED, answer(b"", length=-1)],
    ids=["length", "chunked", "until close"],
)
async def test_an_answer_that_is_too_large(head: bytes) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    async with listening([READ, head, *[chunk] * 64, HOLD]) as server:
        failure = await failure_of(server, max_answer_bytes=10**6)
        await until(lambda: server.open == 0)  # nobody reads the rest of it
    assert not failure.retryable
    assert "more than 1000000 bytes" in str(failure)


async def test_an_answer_that_inflates() -> None:
    bomb = answer(gzip.compress(b"x" * 10**8), headers=GZIP)
    async with listening([READ, bomb, HOLD]) as server:
        failure = await failure_of(server, max_answer_bytes=10**7)
    assert not failure.retryable


async def test_a_name_that_is_not_known() -> None:
    async with opened("http://no-such-host.invalid:80/v1") as transport:
        with pytest.raises(TransportError, match="is the server running") as caught:
            await transport.respond(ASK)
    assert caught.value.retryable
    assert fault_of(caught.value) is Fault.BROKEN


async def test_names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        return await look_up(*arguments, **options)

    monkeypatch.setattr(loop, "getaddrinfo", counting)
    async with listening([READ, WHOLE]) as server:
        async with opened(f"http://localhost:{server.port}/v1") as transport:
            await asyncio.gather(*(transport.respond(ASK) for _ in range(50)))
            assert asked == 1
        async with opened(server.url) as transport:
            await transport.respond(ASK)
            assert asked == 1
    assert server.connections == 51


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://host:99999999/v1"])
async def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises((ConfigurationError, TransportError)) as caught:
        async with opened(url) as transport:
            await transport.respond(ASK)
    if isinstance(caught.value, TransportError):
        assert not caught.value.retryable


async def test_a_pooled_connection_that_the_server_closes_meanwhile_is_no_failure() -> None:
    stale: list[Step] = [READ, WHOLE, READ]  # the second request is read, and the connection closed
    async with listening(stale, [READ, WHOLE]) as server, opened(server.url) as transport:
        await transport.respond(ASK)
        assert (await transport.respond(ASK)).id == "resp_1"
    assert [seen.connection for seen in server.seen] == [0, 0, 1]


async def test_a_pooled_connection_that_breaks_in_the_middle_of_an_answer_is_one() -> None:
    async with listening([READ, WHOLE, READ, WHOLE[:-5]], [READ, WHOLE]) as server:
        async with opened(server.url) as transport:
            await transport.respond(ASK)
            with pytest.raises(TransportError):
                await transport.respond(ASK)
    assert server.connections == 1


def echo(seen: Seen) -> bytes:
    return answer(OK, headers={"X-Request-Id": seen.headers["x-request-id"]})


async def test_ids_travel_with_each_try() -> None:
    async with listening([READ, echo, READ, echo]) as server, opened(server.url) as transport:
        await transport.respond(ASK, request_id="call-1")
        await transport.respond(ASK, request_id="call-1", attempt=2)
    names = [(seen.headers["idempotency-key"], seen.headers["x-request-id"]) for seen in server.seen]
    assert names == [("call-1", "call-1-1"), ("call-1", "call-1-2")]


async def test_the_answer_to_another_request_is_none() -> None:
    def first(seen: Seen) -> bytes:
        return answer(OK, headers={"X-Request-Id": "call-1-1"})

    async with listening([READ, first, READ, first, READ, echo]) as server:
        async with opened(server.url) as transport:
            await transport.respond(ASK, request_id="call-1")
            with pytest.raises(TransportError, match="mixes up answers") as caught:
                await transport.respond(ASK, request_id="call-2")
            assert caught.value.retryable
            await transport.respond(ASK, request_id="call-2", attempt=2)


async def test_a_server_that_makes_ids_of_its_own_is_believed() -> None:
    async with listening([READ, answer(OK, headers={"X-Request-Id": "req_own"})] * 2) as server:
        async with opened(server.url) as transport:
            for name in ("a", "b"):
                assert isinstance(await transport.respond(ASK, request_id=name), Response)


async def test_too_many_open_files_are_this_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("gym_sdk.transport.pool.open_socket", none_left)
    async with listening([READ, WHOLE]) as server:
        failure = await failure_of(server)
    assert fault_of(failure) is Fault.LOCAL


async def test_connections_are_bounded_and_handed_on_in_order() -> None:
    release = asyncio.Event()
    async with listening([READ, release, WHOLE, READ, WHOLE, READ, WHOLE]) as server:
        async with opened(server.url, max_connections=2) as transport:
            order: list[int] = []

            async def call(number: int) -> None:
                await transport.respond(ASK)
                order.append(number)

            async with asyncio.TaskGroup() as tasks:
                for number in range(6):
                    tasks.create_task(call(number))
                await until(lambda: len(server.seen) == 2)
                release.set()
    assert server.connections == 2
    assert sorted(order[:2]) == [0, 1]
    assert sorted(order[2:4]) == [2, 3]


async def test_the_limit_of_open_files_is_raised_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 4096)]

    def set_limit(_: int, limit: tuple[int, int]) -> None:
        limits.append(limit)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert allowed_connections() == 4096 - 512
    assert limits[-1] == (4096, 4096)
    assert allowed_connections(4) == 896
    limits.append((256, 256))
    assert allowed_connections() == 128
    limits.append((1024, resource.RLIM_INFINITY))
    assert allowed_connections() == connections._MOST


async def test_cancelling_thousands_of_calls_closes_their_connections() -> None:
    count = 1000
    async with listening([READ, HOLD]) as server, opened(server.url) as transport:
        calls = [asyncio.create_task(transport.respond(ASK)) for _ in range(count)]
        await until(lambda: len(server.seen) == count, 30)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await until(lambda: server.open == 0, 30)
        assert all(call.cancelled() for call in calls)


async def test_closing_does_not_wait_for_a_peer_that_reads_no_more() -> None:
    large = ResponseRequest(input="x" * 30_000_000)
    async with listening([60.0]) as server:
        transport = HttpTransport(server.url)
        await transport.open()
        call = asyncio.create_task(transport.respond(large))
        await until(lambda: server.connections == 1)
        await asyncio.sleep(0.05)  # what fits into the buffers of the sockets is on its way
        call.cancel()
        async with asyncio.timeout(10):
            await transport.aclose()


async def test_the_probe() -> None:
    async with listening(
        [READ, answer({"status": "ok"})],
        [READ, answer(status="503 Draining")],
        [READ, answer(status="401 Unauthorized")],
    ) as server:
        async with opened(server.url) as transport:
            await transport.probe()
            assert server.seen[0].path == "/health"
            with pytest.raises(TransportError):
                await transport.probe()
            with pytest.raises(PolicyError):
                await transport.probe()


async def test_addresses_of_replicas() -> None:
    one, two = http_transports(["http://a/v1", "http://b/v1"], api_key="k")
    assert one.max_connections == two.max_connections == allowed_connections(2)
    for wrong in ([], "http://a/v1", ["http://a/v1", "http://a/v1/"], ["a"]):
        with pytest.raises(ConfigurationError):
            http_transports(wrong)


async def test_nobody_listens() -> None:
    with free_port() as port:
        async with opened(f"http://127.0.0.1:{port}/v1") as transport:
            with pytest.raises(TransportError, match="is the server running"):
                await transport.respond(ASK)
