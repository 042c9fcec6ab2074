"""What an engine has sampled for one request so far, and what ends it early."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol

from backends.engine import Engine, FinishReason, Generation, GenerationChunk, GenerationRequest
from gym_sdk.tokens import WeightSpan

__all__ = ["Sampled", "Watch", "sample"]


class Sampled:
    """The tokens of one request, growing chunk by chunk.

    Attributes:
        token_ids: what was sampled.
        log_probs: of the same length.
        top_log_probs: of the same length, or empty if none were asked for.
        finish_reason: why it ended; None while it goes on.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[list[tuple[int, float]]] = []
        self.finish_reason: FinishReason | None = None
        self._spans: list[WeightSpan] = []
        self._cached_tokens = 0

    def add(self, chunk: GenerationChunk) -> None:
        """Take what is new."""
        start = len(self.token_ids)
        self.token_ids += chunk.token_ids
        self.log_probs += chunk.log_probs
        self.top_log_probs += chunk.top_log_probs or ()
        self.finish_reason = chunk.finish_reason
        self._cached_tokens = max(self._cached_tokens, chunk.cached_tokens)
        if chunk.token_ids:
            if self._spans and self._spans[-1].version == chunk.weight_version:
                start = self._spans.pop().start
            self._spans.append(WeightSpan(chunk.weight_version, start, len(self.token_ids)))

    def cut(self, size: int) -> None:
        """End it after so many tokens: what was sampled beyond them counts for nothing."""
        del self.token_ids[size:], self.log_probs[size:], self.top_log_probs[size:]
        self._spans = [
            WeightSpan(span.version, span.start, min(span.end, size))
            for span in self._spans
            if span.start < size
        ]
        self.finish_reason = FinishReason.STOP

    def generation(self) -> Generation:
        """Return what was sampled, as `Engine.generate` does."""
        assert self.finish_reason is not None
        return Generation(
            self.token_ids,
            self.log_probs,
            self.finish_reason,
            tuple(self._spans),
            self._cached_tokens,
            self.top_log_probs or None,
        )


class Watch(Protocol):
    """Looks for a reason to end a generation early."""

    async def end(self, sampled: Sampled) -> int | None:
        """Return after how many tokens the generation is over; None if it goes on.

        Called with growing generations, the whole one last; the answer must not depend on how it grew.
        """
        ...


async def sample(
    engine: Engine, request: GenerationRequest, watches: Sequence[Watch] = ()
) -> AsyncGenerator[Sampled, None]:
    """Generate and yield what was sampled so far, the same object each time, ended the last time.

    Leaving it early, or a watch that ends it, aborts the request. Raises as `Engine.stream` does.
    """
    sampled = Sampled()
    async with aclosing(_closable(engine.stream(request))) as chunks:
        async for chunk in chunks:
            sampled.add(chunk)
            ends = [end for watch in watches if (end := await watch.end(sampled)) is not None]
            if ends:
                sampled.cut(min(ends))
            yield sampled
            if sampled.finish_reason is not None:
                return


async def _closable(chunks: AsyncIterator[GenerationChunk]) -> AsyncGenerator[GenerationChunk, None]:
    """Iterate, and close what is iterated when this is closed."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()
