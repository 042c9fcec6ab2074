"""An engine that replays given generations: for token sequences that no sampling would hit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import cycle

from backends.engine import (
    EngineInfo,
    FinishReason,
    Generation,
    GenerationChunk,
    GenerationRequest,
    PauseMode,
    WeightSource,
)
from gym_sdk.tokens import WeightSpan


class ReplayEngine:
    """Answers each request with the next generation; it ends by `stop` if its last token is a stop token.

    Streams come in pieces of as many tokens as `chunks` says, in turn; at once if it says nothing.
    """

    def __init__(
        self,
        generations: Iterable[Sequence[int]],
        *,
        vocab_size: int = 100_000,
        context_length: int = 100_000,
        chunks: Iterable[int] = (),
    ) -> None:
        self._generations = iter(generations)
        self._chunks = list(chunks)
        self._info = EngineInfo(vocab_size=vocab_size, context_length=context_length, weight_version="0")
        self.prompts: list[list[int]] = []

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> Generation:
        ids = list(next(self._generations))
        self.prompts.append(list(request.prompt_token_ids))
        stopped = bool(ids) and ids[-1] in request.sampling.stop_token_ids
        return Generation(
            ids,
            [-0.5] * len(ids),
            FinishReason.STOP if stopped else FinishReason.LENGTH,
            (WeightSpan("0", 0, len(ids)),) if ids else (),
        )

    async def stream(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        generation = await self.generate(request)
        ids, scores = generation.token_ids, generation.log_probs
        sizes = cycle(self._chunks or [len(ids)])
        start = 0
        while start < len(ids):
            end = start + next(sizes)
            reason = generation.finish_reason if end >= len(ids) else None
            yield GenerationChunk(ids[start:end], scores[start:end], "0", reason)
            await asyncio.sleep(0)
            start = end

    async def abort(self, request_id: str | None = None) -> int:
        return 0

    async def pause(self, mode: PauseMode = "in_place") -> None:
        return None

    async def continue_generation(self) -> None:
        return None

    async def update_weights(self, source: WeightSource, *, version: str) -> None:
        return None

    async def aclose(self) -> None:
        return None
