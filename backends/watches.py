"""Reasons to end a generation early: a stop string, or as many calls as may be made."""

from __future__ import annotations

from collections.abc import Sequence

from backends.reading import OutputReader
from backends.rendering.token_text import TokenText
from backends.sampled import Sampled
from backends.stopping import Match, StopStrings, trim
from gym_sdk.schema import FunctionCall, FunctionTool, Item, Message, OutputText, Reasoning, TextPart

__all__ = ["CallWatch", "StopWatch", "trimmed"]


class StopWatch:
    """Ends a generation with the token that completes a stop string.

    Args:
        stops: the strings.
        token_text: what the ids spell.
    """

    def __init__(self, stops: Sequence[str], token_text: TokenText) -> None:
        self._strings = StopStrings(stops, token_text)
        self.match: Match | None = None
        """Where a string was found."""
        self._seen = 0

    def stop_of(self, size: int) -> str | None:
        """Return the stop string that ended a generation of so many tokens, unless something else did."""
        return self.match.stop if self.match is not None and self.match.tokens == size else None

    @property
    def held_bytes(self) -> int:
        """How many bytes at the end of what was sampled may begin a stop string."""
        return self._strings.held_bytes

    async def end(self, sampled: Sampled) -> int | None:
        """Return the place after the stop string."""
        new, self._seen = sampled.token_ids[self._seen :], len(sampled.token_ids)
        self.match = self._strings.feed(new)
        return None if self.match is None else self.match.tokens

    def certain(self, item: Item) -> Item:
        """Return an open item without the end of its text, if that may be the beginning of a stop string."""
        if not isinstance(item, Message | Reasoning):
            return item
        return _shortened(item, self._strings.held(item.text))


class CallWatch:
    """Ends a generation with the token that completes the last call that may be made.

    Args:
        reader: reads generations.
        prompt: the ids that the generation follows.
        tools: the functions on offer.
        most: how many calls may be made.
    """

    def __init__(
        self, reader: OutputReader, prompt: Sequence[int], tools: Sequence[FunctionTool], most: int
    ) -> None:
        self._reader = reader
        self._prompt = prompt
        self._tools = tools
        self._most = most
        self._next_look = 0

    async def end(self, sampled: Sampled) -> int | None:
        """Return the place after the last call that may be made.

        It is looked for now and then: what is sampled in between counts for nothing.
        """
        ids, whole = sampled.token_ids, sampled.finish_reason is not None
        if len(ids) < self._next_look and not whole:
            return None
        self._next_look = len(ids) + max(1, len(ids) // 16)
        if await self._calls(ids, partial=True) >= self._most:
            return await self._first_end(ids, partial=True)
        # some formats tell calls from text only when the generation is over
        if whole and await self._calls(ids, partial=False) > self._most:
            return await self._first_end(ids, partial=False)
        return None

    async def _first_end(self, ids: Sequence[int], *, partial: bool) -> int:
        """Return the size of the shortest beginning that has as many calls as may be made."""
        low, high = 1, len(ids)
        while low < high:  # what one beginning has, every longer one has, too
            middle = (low + high) // 2
            if await self._calls(ids[:middle], partial=partial) >= self._most:
                high = middle
            else:
                low = middle + 1
        return low

    async def _calls(self, ids: Sequence[int], *, partial: bool) -> int:
        parsed = await self._reader.read(ids, prompt=self._prompt, tools=self._tools, partial=partial)
        return sum(isinstance(item, FunctionCall) for item in parsed.items)


def trimmed(item: Item, stop: str) -> Item:
    """Return the last item of a generation that a stop string has ended, without the stop string."""
    if not isinstance(item, Message | Reasoning):
        return item
    return _shortened(item, len(item.text) - len(trim(item.text, stop)))


def _shortened(item: Message | Reasoning, by: int) -> Item:
    """Return an item without the last characters of its last text."""
    if not by or not isinstance(item.content, list) or not item.content:
        return item
    *before, last = item.content
    if not isinstance(last, OutputText | TextPart):
        return item
    last = last.model_copy(update={"text": last.text[: max(0, len(last.text) - by)]})
    return item.model_copy(update={"content": [*before, last]})
