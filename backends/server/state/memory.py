"""Responses in memory, as the objects that they are: unless its request says no, every response is kept."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from backends.server.state.ledger import ChainLedger
from backends.server.state.limits import StateLimits
from backends.server.state.stored import StoredResponse, names_of
from gym_sdk.schema import Item
from gym_sdk.tokens import CallTokens

__all__ = ["MemoryStore"]

_Key: TypeAlias = tuple[str, str]

# measured on CPython 3.11
_RESPONSE_BYTES = 4096
_ITEM_BYTES = 1024
_BODY_FACTOR = 2
_PROMPT_TOKEN_BYTES = 40
_GENERATED_TOKEN_BYTES = 72


@dataclass(slots=True, eq=False)
class _Entry:
    """A response, and the one that it continues, which stays with it."""

    stored: StoredResponse
    tokens: CallTokens | None
    previous: _Entry | None
    expires_at: float

    @property
    def key(self) -> _Key:
        return (self.stored.scope, self.stored.id)

    @property
    def bytes(self) -> int:
        items = len(self.stored.input) + len(self.stored.response.output)
        return _RESPONSE_BYTES + _ITEM_BYTES * items + _BODY_FACTOR * self.stored.size


class MemoryStore:
    """Keeps responses until the process ends, or their room or time is used up.

    Tokens that calls share are counted once, and for as long as a response needs them.

    Args:
        limits: how much is kept, and for how long.
        clock: tells the time in seconds.
    """

    def __init__(
        self, limits: StateLimits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or StateLimits()
        self._clock = clock
        self._by_use: OrderedDict[_Key, _Entry] = OrderedDict()
        self._by_age: OrderedDict[_Key, _Entry] = OrderedDict()
        self._sampled: dict[_Key, _Entry] = {}
        self._sent: dict[_Key, _Entry] = {}
        self._entries: ChainLedger[_Entry] = ChainLedger(
            lambda entry: entry.previous, lambda entry: entry.bytes
        )
        self._tokens: ChainLedger[CallTokens] = ChainLedger(lambda call: call.parent, _token_bytes)

    def __len__(self) -> int:
        return len(self._by_use)

    @property
    def bytes(self) -> int:
        """About how much memory is taken up."""
        return self._entries.total + self._tokens.total

    async def keep(self, stored: StoredResponse) -> None:
        """Keep a response; others may have to go."""
        self._drop_expired()
        old = self._by_use.get((stored.scope, stored.id))
        previous = old.previous if old is not None else self._find(_previous_key(stored))
        entry = _Entry(stored, stored.response.tokens, previous, self._clock() + self.limits.ttl_s)
        for held in self._entries.hold(entry):
            if held.tokens is not None:
                self._tokens.hold(held.tokens)
        if old is not None:
            self._drop(old)
        self._by_use[entry.key] = self._by_age[entry.key] = entry
        for index, items in ((self._sent, stored.input), (self._sampled, stored.response.output)):
            index.update(((stored.scope, name), entry) for name in names_of(items))
        while self._is_full() and len(self._by_use) > 1:
            self._drop(next(iter(self._by_use.values())))

    async def get(self, response_id: str, scope: str) -> StoredResponse | None:
        """Return a response, and note that it is in use."""
        entry = self._find((scope, response_id))
        return None if entry is None else entry.stored

    async def chain(self, response_id: str, scope: str) -> list[StoredResponse] | None:
        """Return a response after all that it continues, oldest first."""
        entry = self._find((scope, response_id))
        chain: list[StoredResponse] = []
        while entry is not None:
            chain.append(entry.stored)
            entry = entry.previous
        return chain[::-1] or None

    async def delete(self, response_id: str, scope: str) -> bool:
        """Let a response go."""
        entry = self._find((scope, response_id))
        if entry is not None:
            self._drop(entry)
        return entry is not None

    async def item(self, item_id: str, scope: str) -> Item | None:
        """Return an item by its id."""
        self._drop_expired()
        key = (scope, item_id)
        entry = self._sampled.get(key) or self._sent.get(key)
        return None if entry is None else entry.stored.item(item_id)

    async def aclose(self) -> None:
        """Let everything go."""
        for entry in list(self._by_use.values()):
            self._drop(entry)

    def _is_full(self) -> bool:
        return self.bytes > self.limits.max_bytes or len(self) > self.limits.max_responses

    def _find(self, key: _Key) -> _Entry | None:
        self._drop_expired()
        entry = self._by_use.get(key)
        if entry is not None:
            self._by_use.move_to_end(key)
        return entry

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._by_age:
            oldest = next(iter(self._by_age.values()))
            if oldest.expires_at > now:
                break
            self._drop(oldest)

    def _drop(self, entry: _Entry) -> None:
        del self._by_use[entry.key], self._by_age[entry.key]
        stored = entry.stored
        for index, items in ((self._sent, stored.input), (self._sampled, stored.response.output)):
            for name in names_of(items):
                if index.get((stored.scope, name)) is entry:
                    del index[stored.scope, name]
        for gone in self._entries.release(entry):
            if gone.tokens is not None:
                self._tokens.release(gone.tokens)


def _previous_key(stored: StoredResponse) -> _Key:
    return (stored.scope, stored.response.previous_response_id or "")


def _token_bytes(call: CallTokens) -> int:
    generated = len(call.generation_token_ids)
    return _PROMPT_TOKEN_BYTES * len(call.new_prompt_ids) + _GENERATED_TOKEN_BYTES * generated
