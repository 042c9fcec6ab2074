"""From the step thread to asyncio: one hand-over per step and event loop, however many requests."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

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
    """Receives chunks as they are sampled; a reader that is slow gets what has piled up as one."""

    streaming = True

    def __init__(self) -> None:
        super().__init__()
        self._piled: list[Item] = []
        self._arrived = asyncio.Event()

    def put(self, item: Item) -> None:
        """Put the chunk on the pile."""
        self._piled.append(item)
        self._arrived.set()

    async def next(self) -> GenerationChunk:
        """Wait for tokens of one weight version; raises what ended the request otherwise."""
        await self._arrived.wait()
        first = self._piled[0]
        if isinstance(first, Exception):
            raise first
        assert isinstance(first, GenerationChunk)
        chunks = [first]
        for item in islice(self._piled, 1, None):
            if not isinstance(item, GenerationChunk) or item.weight_version != first.weight_version:
                break
            chunks.append(item)
        del self._piled[: len(chunks)]
        if not self._piled:
            self._arrived.clear()
        return first if len(chunks) == 1 else _merged(chunks)


def _merged(chunks: Sequence[GenerationChunk]) -> GenerationChunk:
    last = chunks[-1]
    asked = last.top_log_probs is not None
    return replace(
        last,
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        log_probs=[score for chunk in chunks for score in chunk.log_probs],
        top_log_probs=[place for chunk in chunks for place in chunk.top_log_probs or ()] if asked else None,
    )


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
