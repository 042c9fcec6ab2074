"""Responses on disk, so that a restarted server can continue them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from backends.server.state.database import open_database, transaction
from backends.server.state.limits import StateLimits
from backends.server.state.rows import (
    DAMAGED,
    extension_of,
    pack_body,
    pack_tokens,
    unpack_body,
    unpack_tokens,
)
from backends.server.state.stored import StoredResponse, names_of
from gym_sdk.errors import PolicyError
from gym_sdk.schema import Item
from gym_sdk.tokens import CallTokens

__all__ = ["SqliteStore"]

T = TypeVar("T")

_MAX_CHAIN = 10_000
"""What lies further back is not read: whatever the file says, reading ends."""

_MAX_EXPIRED = 256
"""How many responses whose time is up go with each that comes."""

_CONTINUED = (
    "SELECT 1 FROM responses AS next WHERE next.scope = responses.scope AND next.previous = responses.id"
)


class SqliteStore:
    """Keeps responses in one file, which belongs to one server at a time.

    What `keep` has returned for survives the process, however that ends: it is in the file's log (`-wal`),
    which the system holds. It is not forced onto the disk each time, so a machine that loses its power may
    lose the newest responses, but never more than that, and never the file.

    What goes makes room inside the file, which does not shrink.

    Args:
        path: the file; made if there is none. Its folder must exist.
        limits: how much is kept, and for how long; the bytes are not limited here.
        clock: tells the time in seconds since 1970.

    Raises:
        ConfigurationError: the file cannot be opened, is in use, damaged, or no store of responses.
    """

    def __init__(
        self,
        path: str | Path,
        limits: StateLimits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path)
        self.limits = limits or StateLimits()
        self._clock = clock
        # one thread: SQLite's connections belong to one, and writers would wait for each other anyway
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="response-store")
        try:
            self._connection, self._count = self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def keep(self, stored: StoredResponse) -> None:
        """Write a response to the file; the oldest may have to go."""
        await self._write(lambda: self._keep(stored))

    async def get(self, response_id: str, scope: str) -> StoredResponse | None:
        """Read a response."""
        chain = await self._read(lambda: self._chain(response_id, scope, whole=False))
        return chain[-1] if chain else None

    async def chain(self, response_id: str, scope: str) -> list[StoredResponse] | None:
        """Read a response and all that it continues, oldest first."""
        return await self._read(lambda: self._chain(response_id, scope, whole=True)) or None

    async def delete(self, response_id: str, scope: str) -> bool:
        """Let a response go."""
        return await self._write(lambda: self._delete(response_id, scope))

    async def item(self, item_id: str, scope: str) -> Item | None:
        """Read an item by its id."""
        return await self._read(lambda: self._item(item_id, scope))

    async def aclose(self) -> None:
        """Close the file."""
        await self._run(self._connection.close)
        self._thread.shutdown(wait=False)  # nothing runs any more

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _write(self, work: Callable[[], T]) -> T:
        try:
            return await self._run(work)
        except sqlite3.Error as error:
            raise PolicyError(
                f"the store {self.path} cannot be written: {error}", status=507, code="storage_failed"
            ) from error

    async def _read(self, work: Callable[[], T]) -> T:
        try:
            return await self._run(work)
        except (sqlite3.Error, *DAMAGED) as error:
            raise PolicyError(
                f"the store {self.path} cannot be read ({type(error).__name__}: {error})",
                status=500,
                code="storage_failed",
            ) from error

    # What follows runs in the store's thread.

    def _one(self, query: str, *values: object) -> Any:
        return self._connection.execute(query, values).fetchone()

    def _open(self) -> tuple[sqlite3.Connection, int]:
        connection = open_database(self.path)
        return connection, connection.execute("SELECT count(*) FROM responses WHERE NOT hidden").fetchone()[0]

    @property
    def _expiry(self) -> float:
        """What was kept then or earlier has expired."""
        return self._clock() - self.limits.ttl_s

    def _keep(self, stored: StoredResponse) -> None:
        response, key = stored.response, (stored.scope, stored.id)
        previous = response.previous_response_id
        extends = extension_of(response)
        if extends != previous or not self._one(
            "SELECT 1 FROM responses WHERE scope = ? AND id = ?", stored.scope, extends
        ):
            extends = None
        body, tokens = pack_body(stored), pack_tokens(response, extends)
        with transaction(self._connection) as connection:
            was = self._one("SELECT NOT hidden FROM responses WHERE scope = ? AND id = ?", *key)
            connection.execute(
                "INSERT OR IGNORE INTO responses (scope, id, kept_at, body) VALUES (?, ?, 0, '')", key
            )
            connection.execute(
                "UPDATE responses SET previous = ?, extends = ?, hidden = 0, kept_at = ?, body = ?, "
                "tokens = ? WHERE scope = ? AND id = ?",
                (previous, extends is not None, self._clock(), body, tokens, *key),
            )
            number = self._one("SELECT number FROM responses WHERE scope = ? AND id = ?", *key)[0]
            self._name_items(stored, number)
            count = self._count + (0 if was and was[0] else 1)
            count -= self._let_go_of(
                "SELECT number FROM responses WHERE NOT hidden AND kept_at <= ? ORDER BY kept_at LIMIT ?",
                self._expiry,
                _MAX_EXPIRED,
            )
            count -= self._let_go_of(
                "SELECT number FROM responses WHERE NOT hidden ORDER BY kept_at LIMIT ?",
                max(0, count - self.limits.max_responses),
            )
        self._count = count

    def _name_items(self, stored: StoredResponse, number: int) -> None:
        self._connection.execute("DELETE FROM items WHERE response = ?", (number,))
        self._connection.executemany(
            "INSERT OR REPLACE INTO items (scope, id, sampled, response) VALUES (?, ?, ?, ?)",
            [
                (stored.scope, name, sampled, number)
                for sampled, items in enumerate((stored.input, stored.response.output))
                for name in names_of(items)
            ],
        )

    def _delete(self, response_id: str, scope: str) -> bool:
        with transaction(self._connection):
            gone = self._let_go_of(
                "SELECT number FROM responses WHERE scope = ? AND id = ? AND NOT hidden AND kept_at > ?",
                scope,
                response_id,
                self._expiry,
            )
        self._count -= gone
        return gone > 0

    def _let_go_of(self, query: str, *values: object) -> int:
        """Hide responses, and remove those that no other continues; return how many were hidden."""
        numbers = self._connection.execute(query, values).fetchall()
        for (number,) in numbers:
            self._connection.execute("UPDATE responses SET hidden = 1 WHERE number = ?", (number,))
            self._connection.execute("DELETE FROM items WHERE response = ?", (number,))
            self._remove_unneeded(number)
        return len(numbers)

    def _remove_unneeded(self, number: int) -> None:
        """Remove a hidden response if no other continues it, and then those that it continued itself."""
        while True:
            row = self._one(
                "SELECT scope, previous FROM responses WHERE number = ? AND hidden AND NOT EXISTS "
                f"({_CONTINUED})",
                number,
            )
            if row is None:
                return
            self._connection.execute("DELETE FROM responses WHERE number = ?", (number,))
            before = self._one("SELECT number FROM responses WHERE scope = ? AND id = ?", *row)
            if before is None:
                return
            number = before[0]

    def _chain(self, response_id: str, scope: str, *, whole: bool) -> list[StoredResponse]:
        """Read a response after what comes before it, oldest first; if not `whole`, the response alone."""
        rows: list[Any] = []
        name: str | None = response_id
        while name is not None and len(rows) < _MAX_CHAIN:
            row = self._one(
                "SELECT id, previous, extends, tokens, CASE WHEN ? THEN body END FROM responses "
                "WHERE scope = ? AND id = ? AND (? OR (NOT hidden AND kept_at > ?))",
                whole or not rows,
                scope,
                name,
                bool(rows),
                self._expiry,
            )
            if row is None:
                break
            rows.append(row)
            name = row[1] if whole or row[2] else None
        known: dict[str, CallTokens] = {}
        chain: list[StoredResponse] = []
        for name, _, _, tokens, body in reversed(rows):
            extends = None
            if tokens is not None:
                known[name], extends = unpack_tokens(tokens, known)
            if body is not None:
                stored = unpack_body(body, scope)
                chain.append(stored)
                if tokens is not None:
                    stored.response.carrying(known[name], extends=extends)
        return chain

    def _item(self, item_id: str, scope: str) -> Item | None:
        row = self._one(
            "SELECT responses.id FROM items JOIN responses ON number = response "
            "WHERE items.scope = ? AND items.id = ? ORDER BY sampled DESC",
            scope,
            item_id,
        )
        chain = [] if row is None else self._chain(row[0], scope, whole=False)
        return chain[-1].item(item_id) if chain else None
