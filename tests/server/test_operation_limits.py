"""Limits over real connections: bodies, places, deadlines, heads, connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from contextlib import suppress

import pytest
from aiohttp import web
from support.held import HeldEngine, until
from support.operating import ASK, Server, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.errors import error_body, problem_of
from backends.server.operation import (
    TRAFFIC,
    OperationConfig,
    RequestLimits,
    deadline_of,
    operated_application,
    serving,
)
from gym_sdk import GymClient
from gym_sdk.errors import TransportError
from gym_sdk.rollout import Retry

pytestmark = pytest.mark.asyncio


@pytest.fixture
def policy(renderer: TemplateRenderer) -> Policy:
    return Policy(ReplayEngine([renderer.encode("three")] * 8), renderer)


@pytest.fixture
def held(renderer: TemplateRenderer) -> HeldEngine:
    return HeldEngine([renderer.encode("three")] * 8)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        return await reader.read()


async def chunks(size: int) -> asyncio.AsyncIterator[bytes]:
    for _ in range(size // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("form", ["whole", "in pieces", "compressed"])
async def test_large_bodies_are_refused(policy: Policy, form: str) -> None:
    async with operated(policy, limits=RequestLimits(max_body_bytes=50_000)) as server:
        body = json.dumps({"input": "x" * 100_000}).encode()
        headers = {"Content-Encoding": "gzip"} if form == "compressed" else {}
        data = {"whole": body, "in pieces": chunks(100_000), "compressed": gzip.compress(body)}[form]
        answer = await server.ask("POST", "/v1/responses", data=data, headers=headers)
        assert (answer.status, answer.code) == (413, "request_too_large")
        assert "50000 bytes" in answer.body["error"]["message"]
        assert (await server.ask("POST", "/v1/responses", json=ASK)).status == 200


async def test_a_body_just_below_the_limit_is_read(policy: Policy) -> None:
    async with operated(policy, limits=RequestLimits(max_body_bytes=50_000)) as server:
        body = json.dumps(ASK).encode().ljust(50_000)
        for data in (body, gzip.compress(body)):
            headers = {} if data is body else {"Content-Encoding": "gzip"}
            assert (await server.ask("POST", "/v1/responses", data=data, headers=headers)).status == 200


async def test_json_goes_by_any_name_but_multipart(policy: Policy) -> None:
    async with operated(policy) as server:
        body = json.dumps(ASK)
        for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
            headers = {"Content-Type": kind}
            assert (await server.ask("POST", "/v1/responses", data=body, headers=headers)).status == 200
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = await server.ask("POST", "/v1/responses", data=body, headers=headers)
        assert (answer.status, answer.code) == (415, "unsupported_media_type")


async def test_more_calls_than_places_are_told_when_to_come_back(
    renderer: TemplateRenderer, held: HeldEngine
) -> None:
    limits = RequestLimits(max_concurrent=2, retry_after_s=0.4)
    async with operated(Policy(held, renderer), limits=limits) as server:
        calls = [asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK)) for _ in range(2)]
        await until(lambda: held.running == 2)
        answer = await server.ask("POST", "/v1/chat/completions", json={})
        assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after"] == "1"
        assert (await server.ask("GET", "/v1/models")).status == 200  # takes no place
        anthropic = await server.ask("POST", "/v1/messages", json={})
        if anthropic.status == 429:
            assert anthropic.body["error"]["type"] == "rate_limit_error"

        url = f"{server.url}/v1"
        async with GymClient(url, model="policy", retry=Retry(attempts=1)) as client:
            with pytest.raises(TransportError) as caught:
                await client.respond("q")
            assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
        held.release.set()
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200, 200]
        assert (await server.ask("POST", "/v1/responses", json=ASK)).status == 200
        assert server.app[TRAFFIC].model_calls == 0


async def test_our_client_comes_back_when_it_is_told(renderer: TemplateRenderer, held: HeldEngine) -> None:
    async with operated(Policy(held, renderer), limits=RequestLimits(max_concurrent=1)) as server:
        first = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        await until(lambda: held.running == 1)
        async with GymClient(f"{server.url}/v1", model="policy", retry=Retry(base_s=0.01)) as client:
            second = asyncio.create_task(client.respond("q"))
            await asyncio.sleep(0.1)  # the client's own pauses would be over by now, all of them
            held.release.set()
            assert (await second).tokens is not None
        assert (await first).status == 200


async def test_a_call_that_takes_too_long_ends_with_504(renderer: TemplateRenderer, held: HeldEngine) -> None:
    async with operated(Policy(held, renderer), limits=RequestLimits(request_timeout_s=0.2)) as server:
        answer = await server.ask("POST", "/v1/responses", json=ASK)
        assert answer.status == 504
        assert "0.2 s" in answer.body["error"]["message"]
        await until(lambda: held.running == 0)
        assert held.cancelled == 1
        assert server.app[TRAFFIC].model_calls == 0


async def test_a_client_that_goes_away_gives_its_place_back(
    renderer: TemplateRenderer, held: HeldEngine
) -> None:
    async with operated(Policy(held, renderer)) as server:
        call = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        await until(lambda: held.running == 1)
        call.cancel()
        await until(lambda: server.app[TRAFFIC].model_calls == 0)
        await until(lambda: held.cancelled == 1)


async def stream_until_cut(request: web.Request) -> web.StreamResponse:
    """Stream, as a route does that tells its client why it was cut."""
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    await stream.write(b"data: begun\n\n")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        error = deadline_of(request).error
        if error is None:
            raise
        await stream.write(b"data: " + json.dumps(error_body(request, problem_of(error))).encode() + b"\n\n")
    await stream.write_eof()
    return stream


async def test_a_stream_that_has_begun_tells_its_client_that_its_time_is_up(policy: Policy) -> None:
    limits = RequestLimits(request_timeout_s=0.2)
    app = operated_application(policy, (), OperationConfig(limits=limits))
    app.router.add_post("/v1/responses", stream_until_cut)
    async with serving(app, "127.0.0.1", 0, limits) as port:
        answer = await Server(app, port).ask("POST", "/v1/responses")
    assert answer.status == 200
    first, last = (json.loads(line[6:]) if b"{" in line else line for line in answer.body.split(b"\n\n")[:2])
    assert first == b"data: begun"
    assert "0.2 s" in last["error"]["message"]


async def test_last_words_that_do_not_end_cost_the_connection(policy: Policy) -> None:
    ended = asyncio.Event()

    async def talk_on(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse()
        await stream.prepare(request)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert deadline_of(request).error is not None
            try:
                await asyncio.Event().wait()  # as for a client that has stopped to read
            finally:
                ended.set()
        return stream

    limits = RequestLimits(request_timeout_s=0.2, abort_s=0.2)
    app = operated_application(policy, (), OperationConfig(limits=limits))
    app.router.add_post("/v1/responses", talk_on)
    async with serving(app, "127.0.0.1", 0, limits) as port:
        server = Server(app, port)
        reader, writer = await server.connect()
        writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        with suppress(ConnectionError):
            await read_all(reader)
        await asyncio.wait_for(ended.wait(), 10)
        await until(lambda: app[TRAFFIC].model_calls == 0)
        await server.close()


async def test_a_stream_that_breaks_is_not_followed_by_another_answer(
    policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse()
        await stream.prepare(request)
        await stream.write(b"begun")
        raise RuntimeError("a bug")

    app = operated_application(policy, ())
    app.router.add_post("/v1/responses", break_off)
    async with serving(app, "127.0.0.1", 0, RequestLimits()) as port:
        server = Server(app, port)
        reader, writer = await server.connect()
        writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        answer = await read_all(reader)
        await server.close()
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"5\r\nbegun\r\n")  # without the last chunk, so that it is known to be cut
    assert "a bug" in caplog.text


async def test_slow_heads_lose_their_connection(policy: Policy) -> None:
    async with operated(policy, limits=RequestLimits(idle_s=0.3)) as server:
        silent, _ = await server.connect()
        slow, slow_writer = await server.connect()

        async def dribble() -> None:
            for byte in b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 1000:
                slow_writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        assert await read_all(silent) == b""
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            if await read_all(slow) == b"":
                raise ConnectionResetError
        dribbling.cancel()
        assert (await server.ask("GET", "/health")).status == 200


async def test_a_kept_connection_is_closed_when_it_is_idle_or_slow(policy: Policy) -> None:
    async with operated(policy, limits=RequestLimits(idle_s=0.3)) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /hea")
        assert (await read_all(reader)).count(b"HTTP/1.1 200") == 1


HEAD = b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n"
SLOW = RequestLimits(body_window_s=1.0, body_window_bytes=100)


async def test_slow_bodies_are_refused(policy: Policy) -> None:
    async with operated(policy, limits=SLOW) as server:
        reader, writer = await server.connect()
        writer.write(HEAD + b"{")
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 408")
        assert "connection: close" in head.lower()
        length = int(re.findall(r"(?i)content-length: (\d+)", head)[0])
        assert json.loads(await reader.readexactly(length))["error"]["code"] == "request_timeout"
        assert server.app[TRAFFIC].model_calls == 0


async def test_bodies_that_nobody_needs_are_not_waited_for(policy: Policy) -> None:
    async with operated(policy, limits=RequestLimits(body_window_s=3600.0)) as server:
        reader, writer = await server.connect()
        writer.write(HEAD.replace(b"POST /v1/responses", b"GET /health") + b"{")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_bodies_that_keep_their_pace_are_read(policy: Policy) -> None:
    async with operated(policy, limits=SLOW) as server:
        reader, writer = await server.connect()
        writer.write(HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        body = json.dumps(ASK).encode().ljust(5000)
        for start in range(0, 5000, 500):  # over more than one window
            writer.write(body[start : start + 500])
            await asyncio.sleep(0.15)
        assert (await read_all(reader)).startswith(b"HTTP/1.1 200")


async def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(
    policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    async with operated(policy) as server:
        _, writer = await server.connect()
        writer.write(HEAD + b"{")
        await until(lambda: server.app[TRAFFIC].model_calls == 1)
        writer.transport.abort()
        await until(lambda: server.app[TRAFFIC].model_calls == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_in_broken_pieces_ends_too(policy: Policy) -> None:
    async with operated(policy, limits=SLOW) as server:
        reader, writer = await server.connect()
        writer.write(HEAD.replace(b"Content-Length: 5000", b"Transfer-Encoding: chunked") + b"5\r\n{    \r\n")
        await until(lambda: server.app[TRAFFIC].model_calls == 1)
        writer.write(b"no number\r\n")
        # aiohttp tells nobody who reads the body, so that it stalls
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 40")
        assert server.app[TRAFFIC].model_calls == 0


async def test_a_body_that_is_not_what_its_encoding_says_is_the_clients_fault(policy: Policy) -> None:
    async with operated(policy) as server:
        headers = {"Content-Encoding": "gzip"}
        answer = await server.ask("POST", "/v1/responses", data=json.dumps(ASK).encode(), headers=headers)
        assert (answer.status, answer.code) == (400, "invalid_body")


async def test_connections_are_bounded(policy: Policy) -> None:
    async with operated(policy, limits=RequestLimits(max_connections=2)) as server:
        kept = [await server.connect() for _ in range(2)]
        for reader, writer in kept:
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        reader, _ = await server.connect()
        head, _, body = (await read_all(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in head
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        for _, writer in kept:
            writer.close()
            await writer.wait_closed()

        async def served() -> bool:
            reader, writer = await server.connect()
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            return (await read_all(reader)).startswith(b"HTTP/1.1 200")

        async with asyncio.timeout(10):
            while not await served():
                await asyncio.sleep(0.05)
