"""Rewards by key, in an SQLite file that several processes may share."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sqlite3
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Reward

__all__ = ["RewardsFile"]

_log = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 5.0
_TABLE = """
CREATE TABLE IF NOT EXISTS rewards (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE,
    reward TEXT NOT NULL
)
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Opened:
    """What belongs to one process."""

    connection: sqlite3.Connection
    thread: ThreadPoolExecutor
    """One thread: SQLite would let only one write anyway."""
    pid: int

    def close(self) -> None:
        if self.pid == os.getpid():
            self.thread.shutdown(wait=False)
            self.connection.close()


class RewardsFile:
    """Keeps the rewards that were written last.

    SQLite runs in a thread of its own. A file that fails later on (the disk is full, another process holds
    it) costs verifications, not rollouts: a warning is logged, and the reward is not remembered.

    Args:
        path: the file; it and its folder are made if they don't exist.
        max_entries: rewards that are kept.

    Raises:
        ConfigurationError: the file cannot be opened or is something else.
    """

    def __init__(self, path: Path, max_entries: int) -> None:
        self._path = path
        self._max_entries = max_entries
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._opened = self._open()
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"{path} cannot be used as a cache of rewards: {error}") from error

    async def get(self, key: bytes) -> Reward | None:
        """Return a reward, if it is remembered."""
        return await self._run(functools.partial(self._read, key))

    async def put(self, key: bytes, reward: Reward) -> None:
        """Remember a reward."""
        await self._run(functools.partial(self._write, key, reward.model_dump_json()))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        opened = self._current()
        try:
            # left behind when cancelled: it ends by itself, at the latest with the busy timeout
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(opened.thread, work, opened.connection)
        except (sqlite3.Error, ValidationError) as error:
            _log.warning("the cache of rewards %s failed: %s", self._path, error)
            return None

    def _read(self, key: bytes, connection: sqlite3.Connection) -> Reward | None:
        row = connection.execute("SELECT reward FROM rewards WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reward.model_validate_json(row[0])

    def _write(self, key: bytes, reward: str, connection: sqlite3.Connection) -> None:
        with connection:  # a transaction
            connection.execute(
                "INSERT INTO rewards (key, reward) VALUES (?, ?) "
                "ON CONFLICT (key) DO UPDATE SET reward = excluded.reward",
                (key, reward),
            )
            # without counting: ids only grow
            connection.execute(
                "DELETE FROM rewards WHERE id <= (SELECT max(id) FROM rewards) - ?", (self._max_entries,)
            )

    def _current(self) -> _Opened:
        if self._opened.pid != os.getpid():  # neither connections nor threads survive a fork
            self._opened = self._open()
        return self._opened

    def _open(self) -> _Opened:
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a crash may forget the last, nothing else
            connection.execute(_TABLE)
            connection.execute("SELECT key, reward FROM rewards LIMIT 1")
        except BaseException:
            connection.close()
            raise
        opened = _Opened(connection, ThreadPoolExecutor(1, thread_name_prefix="gym-sdk-rewards"), os.getpid())
        weakref.finalize(self, opened.close)
        return opened
