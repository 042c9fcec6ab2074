"""From the step thread to asyncio: one hand-over per step and event loop, however many requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable

from backends.engine import Generation, GenerationChunk
from backends.transformers.request import Item, Output

__all__ = ["ChunkSink", "LoopSink", "ResultSink", "deliver"]


class LoopSink(ABC):
    """A request's end in an event loop."""

    streaming = False

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    @abstractmethod
    def put(self, item: Item) -> None:
        """Take an item; runs in the loop."""


class ResultSink(LoopSink):
    """Receives the whole generation."""

    def __init__(self) -> None:
        super().__init__()
        self.future: asyncio.Future[Generation] = self.loop.create_future()

    def put(self, item: Item) -> None:
        """Resolve the future, unless the caller has left."""
        if self.future.done():
            return
        if isinstance(item, Exception):
            self.future.set_exception(item)
        else:
            assert isinstance(item, Generation)
            self.future.set_result(item)


class ChunkSink(LoopSink):
    """Receives chunks as they are sampled."""

    streaming = True

    def __init__(self) -> None:
        super().__init__()
        self._queue: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """Queue the chunk."""
        self._queue.put_nowait(item)

    async def next(self) -> GenerationChunk:
        """Wait for a chunk; raises what ended the request otherwise."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        assert isinstance(item, GenerationChunk)
        return item


def deliver(outputs: Iterable[Output]) -> None:
    """Hand outputs over to their loops; callable from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[LoopSink, Item]]] = {}
    for output in outputs:
        sink = output.sink
        assert isinstance(sink, LoopSink)
        by_loop.setdefault(sink.loop, []).append((sink, output.item))
    for loop, items in by_loop.items():
        # A loop that is closed has nobody left who waits.
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:
                if not loop.is_closed():
                    raise


def _put_all(items: list[tuple[LoopSink, Item]]) -> None:
    for sink, item in items:
        sink.put(item)
