"""The table of slots: which tokens each row of the cache stands for, and who owns it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.transformers.cache import SlotCache
from backends.transformers.request import RequestState

__all__ = ["Match", "SlotTable"]

_FIELDS = (
    *("tokens", "known", "valid", "owned", "stamp", "key", "sampled"),
    *("temperature", "top_k", "top_p", "constrained", "reported"),
)

# Below this many tokens, computing is cheaper than copying or waiting.
_LEAST_REUSE = 16


@dataclass(frozen=True, slots=True)
class Match:
    """Leading tokens that a row has in common with a prompt.

    Attributes:
        row: the row whose keys and values serve; None if none is worth it.
        length: how many positions of it.
        pending: a row that is being computed now will soon serve for more than that.
    """

    row: int | None
    length: int
    pending: bool


class SlotTable:
    """Per-row state in parallel arrays (R rows), kept in step with the rows of a `SlotCache`.

    A row is owned by a running request, retained (its keys and values may serve a later prompt) or free.

    Attributes:
        tokens: int64 `[R, width]`, the row's token ids.
        known: tokens of the row that are set.
        valid: leading positions whose keys and values are in the cache. An owned row with
            `valid == known - 1` is ready to sample its next token.
        owned: whether a running request holds the row.
        stamp: when a retained row was last used.
        key: uint64, seeds the row's uniform numbers.
        sampled: tokens that the row's request has sampled.
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: in (0, 1].
        constrained: whether a grammar says what the row's request may sample.
        reported: how many of the likeliest tokens the row's request wants to know.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the cache."""
        self.cache.clear()
        self.rows = self.width = 0
        self.tokens = np.zeros((0, 0), np.int64)
        self.known = np.zeros(0, np.int64)
        self.valid = np.zeros(0, np.int64)
        self.owned = np.zeros(0, bool)
        self.stamp = np.zeros(0, np.int64)
        self.key = np.zeros(0, np.uint64)
        self.sampled = np.zeros(0, np.int64)
        self.temperature = np.zeros(0, np.float64)
        self.top_k = np.zeros(0, np.int64)
        self.top_p = np.zeros(0, np.float64)
        self.constrained = np.zeros(0, bool)
        self.reported = np.zeros(0, np.int64)
        self.owners: list[RequestState | None] = []
        self._clock = 0

    def reserve(self, rows: int, width: int) -> None:
        """Grow the table and the cache to these sizes."""
        rows, width = max(rows, self.rows), max(width, self.width)
        if (rows, width) == (self.rows, self.width):
            return
        for name in _FIELDS:
            old: np.ndarray = getattr(self, name)
            new = np.zeros((rows, width) if old.ndim == 2 else rows, old.dtype)
            new[tuple(slice(0, size) for size in old.shape)] = old
            setattr(self, name, new)
        self.owners += [None] * (rows - self.rows)
        self.rows, self.width = rows, width
        self.cache.reserve(rows, width)

    def match(self, tokens: np.ndarray) -> Match:
        """Find the row that shares the most leading tokens with a prompt, all but its last at most."""
        width = min(len(tokens), self.width)
        if not self.rows or len(tokens) <= _LEAST_REUSE:
            return Match(None, 0, pending=False)
        same = self.tokens[:, :width] == tokens[:width]
        lead = np.where(same.all(axis=1), width, same.argmin(axis=1))
        most = len(tokens) - 1
        usable = np.minimum(np.minimum(lead, self.valid), most)
        length = int(usable.max())
        coming = int(np.where(self.owned, np.minimum(lead, self.known - 1), 0).max())
        pending = min(coming, most) - length >= _LEAST_REUSE
        if length < _LEAST_REUSE:
            return Match(None, 0, pending)
        # of equals, one that can be taken over as it is comes first
        whole = (usable == length) & ~self.owned & (self.valid == length)
        row = int((whole if whole.any() else usable == length).argmax())
        return Match(row, length, pending)

    def vacant(self, match: Match) -> int | None:
        """Choose a row for a new request.

        The matched row itself if nobody else can want the rest of it, else a free one, else the retained
        one that was used longest ago; None if every row is owned.
        """
        if match.row is not None and not self.owned[match.row] and self.valid[match.row] == match.length:
            return match.row
        open_rows = np.flatnonzero(~self.owned)
        if not len(open_rows):
            return None
        age = np.where(self.valid[open_rows] == 0, -1, self.stamp[open_rows])
        return int(open_rows[age.argmin()])

    def assign(self, row: int, state: RequestState, tokens: np.ndarray, valid: int) -> None:
        """Give a row to a request."""
        self.tokens[row, : len(tokens)] = tokens
        self.known[row] = len(tokens)
        self.valid[row] = valid
        self.owned[row] = True
        self.key[row] = state.key
        self.sampled[row] = len(state.token_ids)
        self.temperature[row] = state.sampling.temperature
        self.top_k[row] = state.sampling.top_k
        self.top_p[row] = state.sampling.top_p
        self.constrained[row] = state.matcher is not None
        self.reported[row] = state.sampling.top_log_probs
        self.owners[row] = state
        state.row = row

    def release(self, row: int, *, retain: bool) -> None:
        """Take a row from its request; what is valid of it may be retained for a later prompt."""
        state = self.owners[row]
        if state is not None:
            state.row = None
        self.owners[row] = None
        self.owned[row] = False
        if not retain:
            self.valid[row] = 0
        self.known[row] = self.valid[row]
        self._clock += 1
        self.stamp[row] = self._clock

    def gather_ready(self) -> int:
        """Exchange rows so that those ready to sample are the first; return how many they are."""
        ready = self.owned & (self.valid == self.known - 1)
        count = int(ready.sum())
        left = np.flatnonzero(~ready[:count])
        right = np.flatnonzero(ready[count:]) + count
        if not len(left):
            return count
        length = int(max(self.valid[left].max(), self.valid[right].max()))
        kept = self.valid[left] > 0
        sources = np.concatenate([right, left[kept]])
        targets = np.concatenate([left, right[kept]])
        self.cache.copy_rows(sources.tolist(), targets.tolist(), length)
        here, there = np.concatenate([left, right]), np.concatenate([right, left])
        for name in _FIELDS:
            array: np.ndarray = getattr(self, name)
            array[here] = array[there]
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            self.owners[a], self.owners[b] = self.owners[b], self.owners[a]
            for row in (a, b):
                owner = self.owners[row]
                if owner is not None:
                    owner.row = row
        return count
