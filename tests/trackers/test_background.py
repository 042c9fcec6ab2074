"""A tracker whose service is slow, broken or gone: the run goes on, nothing waits without a deadline."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import anyio
import pytest

from gym_sdk.errors import ConfigurationError
from gym_sdk.metrics import Table
from gym_sdk.trackers import BackgroundTracker, QueueLimits, Tracker, tee

pytestmark = pytest.mark.asyncio

TABLE = Table(("a",), ((1,),))


class Recorder:
    """A sink that keeps what it gets, and does what `before` does first."""

    name = "recorder"

    def __init__(self, before: Callable[[str], None] = lambda event: None) -> None:
        self.before = before
        self.events: list[tuple[str, Any]] = []
        self.threads: set[int] = set()

    def open(self) -> None:
        self.note("open", None)

    def write_metrics(self, metrics: Mapping[str, float], step: int | None, time_s: float) -> None:
        self.note("metrics", (dict(metrics), step))

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.note("config", dict(config))

    def write_table(self, name: str, table: Table, step: int | None, time_s: float) -> None:
        self.note("table", (name, table, step))

    def close(self) -> None:
        self.note("close", None)

    def note(self, event: str, value: Any) -> None:
        self.before(event)
        self.threads.add(threading.get_ident())
        self.events.append((event, value))

    @property
    def steps(self) -> list[int]:
        return [value[1] for event, value in self.events if event == "metrics"]


class Gate:
    """Holds the tracker's thread until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, event: str) -> None:
        if event == "metrics":
            self.reached.set()
            assert self.opened.wait(30)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_everything_is_delivered_in_order_by_one_thread() -> None:
    sink = Recorder()
    async with BackgroundTracker(sink) as tracker:
        assert isinstance(tracker, Tracker)
        numbers = {"a": 1.0}
        tracker.log_config({"lr": 0.1})
        tracker.log(numbers, step=1)
        numbers["a"] = 2.0  # what was logged stays as it was
        tracker.log_table("samples", TABLE, step=1)
        tracker.log(numbers)
    assert sink.events == [
        ("open", None),
        ("config", {"lr": 0.1}),
        ("metrics", ({"a": 1.0}, 1)),
        ("table", ("samples", TABLE, 1)),
        ("metrics", ({"a": 2.0}, None)),
        ("close", None),
    ]
    assert len(sink.threads) == 1
    assert threading.get_ident() not in sink.threads
    assert (tracker.delivered, tracker.dropped, tracker.failed) == (4, 0, 0)
    await tracker.aclose()
    assert sink.events.count(("close", None)) == 1


async def test_a_tracker_that_got_nothing_starts_no_thread() -> None:
    sink = Recorder()
    before = threading.active_count()
    async with BackgroundTracker(sink):
        assert threading.active_count() == before
    assert sink.events == []


async def test_a_blocked_service_holds_nobody_up_and_drops_are_counted(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Recorder(gate)
    async with BackgroundTracker(sink, QueueLimits(entries=3)) as tracker:
        tracker.log({}, step=0)
        assert await anyio.to_thread.run_sync(gate.reached.wait, 30)
        for step in range(1, 10):
            tracker.log({}, step=step)
        assert tracker.dropped == 6
        assert tracker.delivered == 0
        gate.opened.set()
    assert sink.steps == [0, 1, 2, 3]
    assert warnings_in(caplog) == ["tracker recorder drops entries: 3 entries wait already"]


async def test_closing_has_a_deadline(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    tracker = BackgroundTracker(Recorder(gate), QueueLimits(close_s=0.05))
    for step in range(5):
        tracker.log({}, step=step)
    assert await anyio.to_thread.run_sync(gate.reached.wait, 30)
    with anyio.fail_after(20):
        await tracker.aclose()
        await tracker.aclose()
    assert tracker.dropped == 4
    assert warnings_in(caplog) == [
        "tracker recorder did not finish within 0.05 s: 4 entries were not delivered"
    ]
    hanging = next(thread for thread in threading.enumerate() if thread.name == "recorder")
    assert hanging.daemon
    gate.opened.set()
    hanging.join(30)
    assert not hanging.is_alive()


@pytest.mark.parametrize("error", [OSError("no route"), SystemExit(1)])
async def test_a_failing_service_is_warned_of_once(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: str) -> None:
        if event in ("metrics", "close"):
            raise error

    async with BackgroundTracker(Recorder(fail)) as tracker:
        for step in range(5):
            tracker.log({}, step=step)
        tracker.log_config({"still": "goes on"})
    assert (tracker.delivered, tracker.failed, tracker.dropped) == (1, 5, 0)
    messages = warnings_in(caplog)
    assert len(messages) == 2
    assert "failed to take an entry (the run goes on)" in messages[0]
    assert "failed to end its run" in messages[1]


async def test_an_unreachable_service_is_tried_again_and_gets_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = 0
    reached = threading.Event()

    def unreachable_twice(event: str) -> None:
        nonlocal tries
        if event == "open":
            tries += 1
            if tries < 3:
                raise ConnectionError("down")
        elif event == "metrics":
            reached.set()

    sink = Recorder(unreachable_twice)
    async with BackgroundTracker(sink, QueueLimits(reopen_s=0.01)) as tracker:
        tracker.log({}, step=1)
        assert await anyio.to_thread.run_sync(reached.wait, 30)
        tracker.log({}, step=2)
    assert sink.steps == [1, 2]
    assert (tries, tracker.failed, tracker.dropped) == (3, 0, 0)
    assert len(warnings_in(caplog)) == 1


async def test_closing_tries_an_unreachable_service_a_last_time(caplog: pytest.LogCaptureFixture) -> None:
    tried = threading.Event()

    def unreachable(event: str) -> None:
        tried.set()
        raise ConnectionError("down")

    tracker = BackgroundTracker(Recorder(unreachable), QueueLimits(reopen_s=600.0))
    tracker.log({}, step=1)
    tracker.log({}, step=2)
    assert await anyio.to_thread.run_sync(tried.wait, 30)
    with anyio.fail_after(20):
        await tracker.aclose()
    assert (tracker.delivered, tracker.dropped) == (0, 2)
    assert warnings_in(caplog)[-1] == "tracker recorder cannot be reached: 2 entries were not delivered"


async def test_a_cancelled_run_still_delivers() -> None:
    sink = Recorder()
    with anyio.CancelScope() as scope:
        async with BackgroundTracker(sink) as tracker:
            tracker.log({}, step=1)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert sink.steps == [1]
    assert sink.events[-1] == ("close", None)


async def test_a_closed_tracker_takes_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    sink = Recorder()
    tracker = BackgroundTracker(sink)
    tracker.log({}, step=1)
    tracker.close()
    tracker.log({}, step=2)
    tracker.log({}, step=3)
    assert sink.steps == [1]
    assert tracker.dropped == 2
    assert warnings_in(caplog) == ["tracker recorder drops entries: it is closed"]


async def test_many_threads_may_log() -> None:
    sink = Recorder()
    async with BackgroundTracker(sink, QueueLimits(entries=4_000)) as tracker:
        threads = [
            threading.Thread(target=lambda: [tracker.log({}, step=n) for n in range(500)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(sink.steps) == sorted(list(range(500)) * 4)


async def test_tee_passes_on_and_closes_all(gate: Gate) -> None:
    slow, quick = Recorder(gate), Recorder()
    first = BackgroundTracker(slow, QueueLimits(close_s=0.05))
    second = BackgroundTracker(quick)
    async with tee(first, second) as both:
        assert isinstance(both, Tracker)
        both.log_config({"lr": 0.1})
        both.log({"a": 1.0}, step=3)
        both.log_table("samples", TABLE)
    assert [event for event, _ in quick.events] == ["open", "config", "metrics", "table", "close"]
    assert first.dropped == 1  # the table; the numbers hang


async def test_limits_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"QueueLimits\.close_s must be positive"):
        QueueLimits(close_s=0)
