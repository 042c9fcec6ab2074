"""Rewards by key, in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict

from gym_sdk.schema import Reward

__all__ = ["RewardsMemory"]


class RewardsMemory:
    """Keeps the rewards that were used last. Event loops of several threads may share it."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._rewards: OrderedDict[bytes, Reward] = OrderedDict()
        self._lock = threading.Lock()

    async def get(self, key: bytes) -> Reward | None:
        """Return a reward, if it is remembered."""
        with self._lock:
            reward = self._rewards.get(key)
            if reward is not None:
                self._rewards.move_to_end(key)
            return reward

    async def put(self, key: bytes, reward: Reward) -> None:
        """Remember a reward."""
        with self._lock:
            self._rewards[key] = reward
            self._rewards.move_to_end(key)
            while len(self._rewards) > self._max_entries:
                self._rewards.popitem(last=False)
