"""The store on disk: restarts, crashes, and files that are not what they should be."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.stored import stored

from backends.server.state import SqliteStore, StateLimits
from gym_sdk.errors import ConfigurationError, PolicyError

pytestmark = pytest.mark.asyncio

TESTS = Path(__file__).parents[1]

KEEPS = """
import asyncio, sys
from support.stored import stored
from backends.server.state import SqliteStore

async def main():
    store = SqliteStore(sys.argv[1])
    last = None
    for number in range(100_000):
        last = stored(str(number), previous=last, response_id=f"resp_{number}")
        await store.keep(last)
        print(number, flush=True)

asyncio.run(main())
"""

FILLS = """
import asyncio, resource, signal, sys
from support.stored import asked, stored
from backends.server.state import SqliteStore, StoredResponse, try_keep
from gym_sdk.errors import PolicyError

async def main():
    store = SqliteStore(sys.argv[1])
    first = stored("first")
    await store.keep(first)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    import random
    text = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=400_000))
    large = StoredResponse.of(stored("large").response, [asked(text)])
    try:
        await store.keep(large)
    except PolicyError as error:
        print(error.status, error.code, error)
    print(await try_keep(store, large))
    print(await store.get(large.id, "") is None, (await store.get(first.id, "")).id == first.id)
    await store.keep(stored("small"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.keep(large)
    print(await store.get(large.id, "") is not None)
    await store.aclose()

asyncio.run(main())
"""


def start(script: str, path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )


async def test_what_keep_returned_for_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    with start(KEEPS, path) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    number = int([line for line in said if line.endswith("\n")][-1])
    assert number >= 49
    store = SqliteStore(path)
    chain = await store.chain(f"resp_{number}", "")
    assert chain is not None
    assert [one.id for one in chain] == [f"resp_{count}" for count in range(number + 1)]
    tokens = chain[-1].response.tokens
    assert tokens is not None
    assert tokens.total_tokens == 5 * (number + 1)
    await store.aclose()


async def test_a_full_disk_costs_no_more_than_the_copy(tmp_path: Path) -> None:
    with start(FILLS, tmp_path / "kept.db") as process:
        said, _ = process.communicate(timeout=100)
    lines = said.splitlines()
    assert lines[0].startswith("507 storage_failed the store ")
    assert lines[1:] == ["False", "True True", "True"]
    assert process.returncode == 0


async def test_a_file_belongs_to_one_server(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    store = SqliteStore(path)
    kept = stored("one")
    await store.keep(kept)
    with pytest.raises(ConfigurationError, match="in use by another server"):
        SqliteStore(path)
    await store.aclose()
    again = SqliteStore(path)
    assert await again.get(kept.id, "") is not None
    await again.aclose()


async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    store = SqliteStore(path)
    for number in range(200):
        await store.keep(stored(str(number)))
    await store.aclose()
    whole = path.read_bytes()
    for damaged in (
        b"no database at all" * 100,
        whole[:100] + bytes(4096) + whole[4196:],
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + bytes(range(256)) * 32 + whole[len(whole) // 2 + 8192 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=r"is damaged or no database .*move it away"):
            SqliteStore(path)
    path.unlink()
    await SqliteStore(path).aclose()


async def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    kept, other = stored("one"), stored("other")
    store = SqliteStore(path)
    await store.keep(kept)
    await store.keep(other)
    await store.aclose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE responses SET body = x'00' WHERE id = ?", (kept.id,))
    store = SqliteStore(path)
    with pytest.raises(PolicyError, match="cannot be read") as caught:
        await store.get(kept.id, "")
    assert (caught.value.status, caught.value.code) == (500, "storage_failed")
    assert await store.get(other.id, "") is not None
    assert await store.delete(kept.id, "")
    await store.aclose()


async def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (x)")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="a database of something else"):
        SqliteStore(path)
    assert path.read_bytes() == before


async def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    await SqliteStore(path).aclose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match="has the format 99"):
        SqliteStore(path)


async def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "kept.db"):
        with pytest.raises(ConfigurationError, match="cannot be opened"):
            SqliteStore(path)


async def test_what_nothing_continues_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    store = SqliteStore(path, StateLimits(max_responses=2))
    last = None
    for number in range(20):
        last = stored(str(number), previous=last)
        await store.keep(last)
    lone = [stored(f"lone {number}") for number in range(2)]
    for each in lone:
        await store.keep(each)
    await store.aclose()
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT id, hidden FROM responses ORDER BY number").fetchall()
        items = connection.execute("SELECT count(*) FROM items").fetchone()
    assert rows == [(each.id, 0) for each in lone]
    assert items == (2,)


async def test_the_number_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "kept.db"
    each = [stored(str(number)) for number in range(4)]
    for one in each:
        store = SqliteStore(path, StateLimits(max_responses=2))
        await store.keep(one)
        await store.aclose()
    store = SqliteStore(path)
    assert [await store.get(one.id, "") is not None for one in each] == [False, False, True, True]
    await store.aclose()
