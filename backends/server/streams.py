"""Model calls as server-sent events, while somebody reads them or in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from backends.server.errors import Problem
from backends.server.exchange import Exchange
from backends.server.operation import deadline_of
from backends.server.sse import event_stream
from backends.server.state import Run
from backends.server.surfaces import Events

__all__ = ["make_in_background", "stream"]

_CANCELLED = Problem("Cancelled", 499, "the response was cancelled", code="cancelled")


async def stream(exchange: Exchange, events: Events) -> web.StreamResponse:
    """Answer with a stream; what is refused before it has begun is raised.

    A client that goes away ends the calls.
    """
    await exchange.accepted()
    answer = event_stream()
    try:
        await answer.prepare(exchange.http)
        await _write(answer, exchange, events)
        await answer.write_eof()
    except ConnectionError:
        exchange.abandoned()
    return answer


async def make_in_background(run: Run, exchange: Exchange, events: Events | None) -> None:
    """Make a response that is accepted; its run always has the newest state and, if asked for, the events."""
    try:
        async with aclosing(_pieces(exchange, events)) as pieces:
            async for piece in pieces:
                snapshot = exchange.newest[0]
                response = snapshot.response
                if not snapshot.done:
                    response = response.model_copy(update={"output": list(snapshot.items)})
                run.response = response
                if run.streamed and piece:
                    run.write(piece)
    except asyncio.CancelledError:
        if run.streamed and events is not None:
            run.write(events.failure(_CANCELLED))
        exchange.abandoned()
        raise
    except Exception as error:
        problem = exchange.failed(error)
        if run.streamed and events is not None:
            run.write(events.failure(problem))
        raise
    finally:
        await exchange.calls.aclose()


async def _write(answer: web.StreamResponse, exchange: Exchange, events: Events) -> None:
    try:
        async with aclosing(_pieces(exchange, events)) as pieces:
            async for piece in pieces:
                if piece is None:
                    await answer.write(events.keep_alive)
                elif piece:
                    await answer.write(piece)
    except ConnectionError:
        raise
    except asyncio.CancelledError:
        error = deadline_of(exchange.http).error
        if error is None:
            raise  # the client went away
        await answer.write(events.failure(exchange.failed(error)))
    except Exception as error:
        await answer.write(events.failure(exchange.failed(error)))


async def _pieces(exchange: Exchange, events: Events | None) -> AsyncGenerator[bytes | None, None]:
    """Yield the bytes of a stream as there is news, maybe none; None where there was no news for a while."""
    piece = b"" if events is None else events.opening(exchange.calls.begun)
    news = sorted(exchange.newest.items())
    while True:
        for choice, snapshot in news:
            if snapshot.done:
                await exchange.ended(choice, snapshot.response)
        if events is not None:
            piece += b"".join(events.progress(*new) for new in news)
        if exchange.is_done:
            break
        yield piece if news else None
        piece = b""
        news = await exchange.look()
    yield piece if events is None else piece + events.closing()
