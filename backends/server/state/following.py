"""The stream of a response that is made in the background."""

from __future__ import annotations

import asyncio

from aiohttp import web

from backends.server.sse import KEEP_ALIVE, event_stream
from backends.server.state.background import Run

__all__ = ["follow"]


async def follow(
    http: web.Request, run: Run, *, starting_after: int = -1, keep_alive_s: float = 15.0
) -> web.StreamResponse:
    """Answer with the events of a run, as they come. The run goes on when the client leaves.

    Args:
        http: what is answered.
        run: one that was asked for as a stream.
        starting_after: the sequence number of the last event that the client has.
        keep_alive_s: how often a stream that has no news says that it is alive.
    """
    stream = event_stream()
    try:
        await stream.prepare(http)
        position = starting_after
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    events = await run.after(position)
            except TimeoutError:
                await stream.write(KEEP_ALIVE)
                continue
            if not events:
                break
            await stream.write(b"".join(events))
            position += len(events)
        await stream.write_eof()
    except ConnectionError:
        pass  # the client is gone
    return stream
