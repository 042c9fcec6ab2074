"""The file of a `SqliteStore`: opened, checked, and its tables made."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gym_sdk.errors import ConfigurationError

__all__ = ["open_database", "transaction"]

_APPLICATION = 0x67796D73  # "gyms"
_VERSION = 1
_WAIT_S = 2.0
"""How long to wait for a server that is about to let go of the file."""

_SCHEMA = f"""
BEGIN;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
CREATE TABLE responses (
    number INTEGER PRIMARY KEY,
    scope TEXT NOT NULL,
    id TEXT NOT NULL,
    previous TEXT,
    extends INTEGER NOT NULL DEFAULT 0,
    hidden INTEGER NOT NULL DEFAULT 0,
    kept_at REAL NOT NULL,
    body BLOB NOT NULL,
    tokens BLOB,
    UNIQUE (scope, id)
);
CREATE INDEX continued ON responses (scope, previous);
CREATE INDEX shown ON responses (kept_at) WHERE NOT hidden;
CREATE TABLE items (
    scope TEXT NOT NULL,
    id TEXT NOT NULL,
    sampled INTEGER NOT NULL,
    response INTEGER NOT NULL REFERENCES responses ON DELETE CASCADE,
    PRIMARY KEY (scope, id, sampled)
) WITHOUT ROWID;
CREATE INDEX of_response ON items (response);
COMMIT;
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open a file, or make it.

    Raises:
        ConfigurationError: it cannot be opened, is in use, damaged, newer, or no store of responses.
    """
    try:
        connection = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
    except sqlite3.Error as error:
        raise ConfigurationError(f"the store {path} cannot be opened: {error}") from error
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Write all or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself undoes it after some errors
            connection.execute("ROLLBACK")
        raise


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        is_new = not _number(connection, "PRAGMA schema_version")
        if is_new:
            connection.executescript(_SCHEMA)
        _check_kind(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise _damaged(path, " ".join(found.split()))
        with transaction(connection):  # takes the lock, which is kept
            pass
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise ConfigurationError(
                f"the store {path} is in use by another server; every server needs a file of its own"
            ) from error
        raise ConfigurationError(f"the store {path} cannot be used: {error}") from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    if _number(connection, "PRAGMA application_id") != _APPLICATION:
        raise ConfigurationError(f"{path} is a database of something else; name another file")
    version = _number(connection, "PRAGMA user_version")
    if version != _VERSION:
        raise ConfigurationError(
            f"the store {path} has the format {version}, and this version of gym-sdk reads {_VERSION}; "
            "name another file"
        )


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(pragma).fetchone()[0])


def _damaged(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the store {path} is damaged or no database ({why}); move it away (a new one is made), or restore "
        "it from a copy"
    )
