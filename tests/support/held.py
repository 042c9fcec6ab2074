"""An engine that waits or breaks: for calls that are still in flight when something happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from backends.engine import Generation, GenerationRequest
from support.replay import ReplayEngine


class HeldEngine(ReplayEngine):
    """Generates only once `release` is set; counts what runs and what was cancelled."""

    def __init__(
        self, generations: Iterable[Sequence[int]], *, error: Exception | None = None, after_s: float = 0.0
    ) -> None:
        super().__init__(generations)
        self.release = asyncio.Event()
        self.started = asyncio.Event()
        self.running = 0
        self.cancelled = 0
        self._error = error
        self._after_s = after_s

    async def generate(self, request: GenerationRequest) -> Generation:
        self.running += 1
        self.started.set()
        try:
            if self._after_s:
                await asyncio.sleep(self._after_s)
            else:
                await self.release.wait()
            if self._error is not None:
                raise self._error
            return await super().generate(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
