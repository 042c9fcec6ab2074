"""What runs in the background: followed, cancelled, broken, and how it ends with its server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.held import until
from support.stored import stored

from backends.server.errors import BusyError
from backends.server.state import BackgroundLimits, BackgroundRuns, MemoryStore, Run, StoredResponse
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import Message

pytestmark = pytest.mark.asyncio


def queued(response_id: str = "resp_1", scope: str = "") -> StoredResponse:
    return stored("x", status="queued", background=True, response_id=response_id, scope=scope)


class Maker:
    """Makes a response piece by piece, as it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = asyncio.Semaphore(0)
        self.cancelled = False
        self._error = error

    async def __call__(self, run: Run) -> None:
        try:
            for number in range(3):
                await self.go.acquire()
                message = Message(role="assistant", content=str(number))
                update = {"status": "in_progress", "output": [message]}
                run.response = run.response.model_copy(update=update)
                run.write(b"event: e\ndata: %d\n\n" % number)
            await self.go.acquire()
            if self._error is not None:
                raise self._error
            run.response = run.response.model_copy(update={"status": "completed"})
            run.write(b"event: e\ndata: 3\n\ndata: [DONE]\n\n")
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def finish(self) -> None:
        for _ in range(4):
            self.go.release()


@pytest_asyncio.fixture
async def store() -> AsyncIterator[MemoryStore]:
    yield MemoryStore()


@pytest_asyncio.fixture
async def runs(store: MemoryStore) -> AsyncIterator[BackgroundRuns]:
    runs = BackgroundRuns(store, BackgroundLimits(max_runs=2, max_logs=2))
    yield runs
    await runs.aclose()


async def status_of(store: MemoryStore, response_id: str = "resp_1") -> str:
    kept = await store.get(response_id, "")
    assert kept is not None
    return kept.response.status


async def finished(runs: BackgroundRuns) -> None:
    await until(lambda: not len(runs), 60)


async def read(run: Run, starting_after: int = -1) -> bytes:
    return b"".join([event async for event in run.events(starting_after)])


ALL = b"".join(b"event: e\ndata: %d\n\n" % number for number in range(4)) + b"data: [DONE]\n\n"


async def test_a_run_has_its_newest_state_and_is_kept(runs: BackgroundRuns, store: MemoryStore) -> None:
    maker = Maker()
    run = await runs.start(queued(), maker)
    assert await status_of(store) == "queued"
    assert runs.get("resp_1", "") is run
    assert runs.get("resp_1", "other") is None
    assert runs.is_running("resp_1", "")
    maker.go.release()
    await until(lambda: run.response.status == "in_progress", 60)
    assert run.response.output_text == "0"
    maker.finish()
    await finished(runs)
    assert not runs.is_running("resp_1", "")
    kept = await store.get("resp_1", "")
    assert kept is not None
    assert kept.response is run.response
    assert kept.response.status == "completed"
    assert kept.input == queued().input


async def test_any_number_of_readers_follow_from_anywhere(runs: BackgroundRuns) -> None:
    maker = Maker()
    run = await runs.start(queued(), maker, streamed=True)
    readers = [asyncio.create_task(read(run, after)) for after in (-1, -1, 0, 2, 50)]
    maker.go.release()
    await until(lambda: run.response.output_text == "0", 60)
    readers.append(asyncio.create_task(read(run)))
    maker.finish()
    events = ALL.split(b"\n\n")[:-1]
    rest = [b"".join(event + b"\n\n" for event in events[after + 1 :]) for after in (-1, -1, 0, 2, 50, -1)]
    assert await asyncio.gather(*readers) == rest
    await finished(runs)
    late = runs.get("resp_1", "")
    assert late is run
    assert await read(late) == ALL
    assert await read(late, 4) == b""


async def test_a_reader_that_leaves_disturbs_nobody(runs: BackgroundRuns) -> None:
    maker = Maker()
    run = await runs.start(queued(), maker, streamed=True)
    stays, leaves = asyncio.create_task(read(run)), asyncio.create_task(read(run))
    await asyncio.sleep(0)
    leaves.cancel()
    maker.finish()
    assert await stays == ALL
    assert leaves.cancelled()


async def test_a_cancelled_run_keeps_what_there_was(runs: BackgroundRuns, store: MemoryStore) -> None:
    maker = Maker()
    run = await runs.start(queued(), maker, streamed=True)
    maker.go.release()
    await until(lambda: run.response.output_text == "0", 60)
    reader = asyncio.create_task(read(run))
    await asyncio.gather(runs.cancel("resp_1", ""), runs.cancel("resp_1", ""))
    assert maker.cancelled
    assert await status_of(store) == "cancelled"
    assert run.response.output_text == "0"
    assert await reader == b"event: e\ndata: 0\n\n"
    await runs.cancel("resp_1", "")
    await runs.cancel("resp_x", "")
    assert await status_of(store) == "cancelled"


async def test_a_run_that_never_began_lets_go_of_what_it_was_to_have(runs: BackgroundRuns) -> None:
    begun, let_go = False, asyncio.Event()

    async def work(run: Run) -> None:
        nonlocal begun
        begun = True

    run = await runs.start(queued(), work)
    run.when_ended(let_go.set)
    await runs.aclose()  # before the first step of the work
    assert not begun
    assert let_go.is_set()
    assert run.response.status == "failed"


async def test_what_finished_first_is_not_cancelled(runs: BackgroundRuns, store: MemoryStore) -> None:
    async def stubborn(run: Run) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            run.response = run.response.model_copy(update={"status": "completed"})

    await runs.start(queued(), stubborn)
    await asyncio.sleep(0)
    await runs.cancel("resp_1", "")
    assert await status_of(store) == "completed"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("broken"), "server_error", "RuntimeError: broken"),
        (PolicyError("too long"), "invalid_prompt", "too long"),
    ],
)
async def test_a_run_that_breaks_has_failed(
    runs: BackgroundRuns, store: MemoryStore, error: Exception, code: str, message: str
) -> None:
    maker = Maker(error)
    await runs.start(queued(), maker)
    maker.finish()
    await finished(runs)
    kept = await store.get("resp_1", "")
    assert kept is not None
    assert kept.response.status == "failed"
    assert kept.response.error is not None
    assert (kept.response.error.code, kept.response.error.message) == (code, message)


async def test_a_run_without_an_answer_has_failed(runs: BackgroundRuns, store: MemoryStore) -> None:
    async def idle(run: Run) -> None:
        run.response = run.response.model_copy(update={"status": "in_progress"})

    await runs.start(queued(), idle)
    await finished(runs)
    assert await status_of(store) == "failed"


async def test_too_many_are_refused(runs: BackgroundRuns) -> None:
    makers = [Maker(), Maker()]
    for number, maker in enumerate(makers):
        await runs.start(queued(f"resp_{number}"), maker)
    with pytest.raises(BusyError) as caught:
        await runs.start(queued("resp_2"), Maker())
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
    for maker in makers:
        maker.finish()
    await finished(runs)
    await runs.start(queued("resp_2"), Maker())


async def test_logs_of_finished_runs_are_few(runs: BackgroundRuns, store: MemoryStore) -> None:
    for number in range(3):
        maker = Maker()
        await runs.start(queued(f"resp_{number}"), maker, streamed=True)
        maker.finish()
        await finished(runs)
    assert [runs.get(f"resp_{number}", "") is not None for number in range(3)] == [False, True, True]
    runs.forget("resp_1", "")
    assert runs.get("resp_1", "") is None
    assert await status_of(store, "resp_0") == "completed"


async def test_logs_are_dropped_after_a_while(store: MemoryStore) -> None:
    runs = BackgroundRuns(store, BackgroundLimits(log_s=1e-9))
    maker = Maker()
    await runs.start(queued(), maker, streamed=True)
    maker.finish()
    await finished(runs)
    assert runs.get("resp_1", "") is None


async def test_the_end_of_the_server_ends_what_runs(store: MemoryStore) -> None:
    runs = BackgroundRuns(store)
    maker = Maker()
    run = await runs.start(queued(), maker, streamed=True)
    reader = asyncio.create_task(read(run))
    maker.go.release()
    await until(lambda: run.response.output_text == "0", 60)
    await runs.aclose()
    assert maker.cancelled
    assert await reader == b"event: e\ndata: 0\n\n"
    kept = await store.get("resp_1", "")
    assert kept is not None
    assert kept.response.error is not None
    assert kept.response.error.message == "the server stopped before this was done"
    with pytest.raises(BusyError) as caught:
        await runs.start(queued(), maker)
    assert caught.value.status == 503


async def test_the_end_waits_only_so_long(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stubborn(run: Run) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    runs = BackgroundRuns(store, BackgroundLimits(abort_s=0.01))
    await runs.start(queued(), stubborn)
    await asyncio.sleep(0)
    await runs.aclose()
    assert "1 background runs do not stop" in caplog.text
    release.set()
    await finished(runs)


class FullStore(MemoryStore):
    """Has room for so many."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    async def keep(self, stored: StoredResponse) -> None:
        self.room -= 1
        if self.room < 0:
            raise PolicyError("no room", status=507, code="storage_failed")
        await super().keep(stored)


async def test_without_room_nothing_starts() -> None:
    runs = BackgroundRuns(FullStore(0), BackgroundLimits(max_runs=1))
    for _ in range(2):
        with pytest.raises(PolicyError, match="no room"):
            await runs.start(queued(), Maker())
    assert len(runs) == 0


async def test_without_room_the_answer_can_still_be_read() -> None:
    runs = BackgroundRuns(FullStore(1))
    maker = Maker()
    await runs.start(queued(), maker)
    maker.finish()
    await finished(runs)
    run = runs.get("resp_1", "")
    assert run is not None
    assert run.response.status == "completed"
    await runs.aclose()


@pytest.mark.parametrize("name", BackgroundLimits.__slots__)
async def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        BackgroundLimits(**{name: 0})
