"""A script for `ScriptedTransport` whose calls end when the test says so, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gym_sdk.schema import Response, ResponseRequest
from gym_sdk.tokens import CallTokens, WeightSpan
from support.held import until
from support.scripted import respond, say

__all__ = ["ByHand", "HeldCall", "said_with"]


@dataclass
class HeldCall:
    """A model call in flight."""

    request: ResponseRequest
    future: asyncio.Future[Any]
    cancelled: bool = False

    @property
    def text(self) -> str:
        """What the task says."""
        return str(self.request.input[0].text)  # type: ignore[union-attr]

    def answer(self, answer: Any = "0") -> None:
        """End it; text becomes a message."""
        if not self.future.done():
            self.future.set_result(say(answer) if isinstance(answer, str) else answer)


@dataclass
class ByHand:
    """Holds every call until the test answers it."""

    calls: list[HeldCall] = field(default_factory=list)

    async def __call__(self, request: ResponseRequest) -> Any:
        call = HeldCall(request, asyncio.get_running_loop().create_future())
        self.calls.append(call)
        try:
            return await call.future
        except asyncio.CancelledError:
            call.cancelled = True
            raise

    @property
    def held(self) -> list[HeldCall]:
        """Those that were neither answered nor cancelled, in order of arrival."""
        return [call for call in self.calls if not call.future.done() and not call.cancelled]

    async def arrived(self, count: int) -> list[HeldCall]:
        """Wait until so many calls came, all in all, and return all of them."""
        await until(lambda: len(self.calls) >= count)
        return self.calls


def said_with(text: str, *versions: str, items: Sequence[Any] = ()) -> Response:
    """Return a response whose tokens were sampled by these weights, one each; with a message, or items."""
    response = respond(items, tokens=False) if items else say(text)
    ids = list(range(3, 3 + len(versions)))
    spans = [WeightSpan(version, at, at + 1) for at, version in enumerate(versions)]
    tokens = CallTokens([1, 2], ids, [-0.5] * len(ids), spans)
    response.output[-1] = response.output[-1].with_tokens(tokens)
    return response
