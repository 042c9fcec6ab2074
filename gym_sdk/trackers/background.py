"""A tracker whose deliveries may be slow or fail, without the run noticing."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias

import anyio
import anyio.to_thread

from gym_sdk.errors import ConfigurationError
from gym_sdk.metrics import Table
from gym_sdk.trackers.protocol import Sink

__all__ = ["BackgroundTracker", "QueueLimits"]

_log = logging.getLogger(__name__)

Delivery: TypeAlias = Callable[[], None]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much a tracker holds back, and how long it is waited for.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    entries: int = 1024
    """Most calls of `log`, `log_config` and `log_table` that wait; further ones are dropped."""
    close_s: float = 30.0
    """How long `aclose` waits for the last delivery."""
    reopen_s: float = 30.0
    """How long after a service could not be reached it is tried again."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"QueueLimits.{name} must be positive, not {getattr(self, name)}")


class BackgroundTracker:
    """Delivers to a sink from a thread of its own, which starts with the first entry.

    `log` and its siblings take microseconds. Entries are delivered in order. A delivery that raises is lost;
    what finds the queue full is dropped; both are counted, and warned of once. `aclose` waits for what is
    queued, at most `limits.close_s`; a thread that hangs beyond is left behind (it is a daemon and does not
    keep the process alive). Leaving `async with tracker` closes it.

    Args:
        sink: what delivers.
        limits: of the queue.
    """

    def __init__(self, sink: Sink, limits: QueueLimits | None = None) -> None:
        self._sink = sink
        self._limits = limits or QueueLimits()
        self._queue: deque[Delivery] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._abandoned = False
        self._unreachable = False
        self._opened = False
        self._delivered = 0
        self._dropped = 0
        self._failed = 0

    @property
    def delivered(self) -> int:
        """Entries that the sink took."""
        return self._delivered

    @property
    def dropped(self) -> int:
        """Entries that were given up: the queue was full, the tracker closed, or its deadline over."""
        return self._dropped

    @property
    def failed(self) -> int:
        """Entries that the sink refused with an exception."""
        return self._failed

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Take numbers by name (see `Tracker.log`)."""
        self._put(partial(self._sink.write_metrics, dict(metrics), step, time.time()))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take settings of the run (see `Tracker.log_config`)."""
        self._put(partial(self._sink.write_config, dict(config)))

    def log_table(self, name: str, table: Table, *, step: int | None = None) -> None:
        """Take a table (see `Tracker.log_table`)."""
        self._put(partial(self._sink.write_table, name, table, step, time.time()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Deliver what is queued and end, within `limits.close_s`, also if the caller is cancelled."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)

    def close(self) -> None:
        """Do what `aclose` does, for callers without an event loop: blocks for at most `limits.close_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None or self._abandoned:
            return
        thread.join(self._limits.close_s)
        if thread.is_alive():
            self._abandoned = True
            self._give_up(f"did not finish within {self._limits.close_s:g} s")

    def _put(self, delivery: Delivery) -> None:
        with self._changed:
            if self._closing or len(self._queue) >= self._limits.entries:
                self._dropped += 1
                first = self._dropped == 1
            else:
                first = False
                self._queue.append(delivery)
                self._changed.notify_all()
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name=self._sink.name, daemon=True)
                self._thread.start()
        if first:
            why = "it is closed" if self._closing else f"{self._limits.entries} entries wait already"
            _log.warning("tracker %s drops entries: %s", self._sink.name, why)

    def _run(self) -> None:
        """Deliver until the tracker is closed and the queue empty. The thread's body."""
        while (delivery := self._next()) is not None:
            try:
                delivery()
            except (Exception, SystemExit) as error:
                self._count_failure(error)
            else:
                self._delivered += 1
        if self._opened:
            try:
                self._sink.close()
            except (Exception, SystemExit) as error:
                _log.warning("tracker %s failed to end its run: %r", self._sink.name, error)

    def _next(self) -> Delivery | None:
        """Wait for an entry and for an open sink; None at the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return None
            if self._opened or self._open():
                with self._changed:
                    return self._queue.popleft() if self._queue else None
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=self._limits.reopen_s)
                closing = self._closing
            if closing and not self._open():
                if not self._abandoned:
                    self._give_up("cannot be reached")
                return None

    def _open(self) -> bool:
        if not self._opened:
            try:
                self._sink.open()
                self._opened = True
            except (Exception, SystemExit) as error:
                _log.log(
                    logging.DEBUG if self._unreachable else logging.WARNING,
                    "tracker %s cannot be reached (tried again every %g s, the run goes on): %r",
                    self._sink.name,
                    self._limits.reopen_s,
                    error,
                )
                self._unreachable = True
        return self._opened

    def _count_failure(self, error: BaseException) -> None:
        self._failed += 1
        if self._failed == 1:
            _log.warning("tracker %s failed to take an entry (the run goes on): %r", self._sink.name, error)

    def _give_up(self, why: str) -> None:
        with self._changed:
            lost = len(self._queue)
            self._queue.clear()
            self._dropped += lost
        _log.warning("tracker %s %s: %d entries were not delivered", self._sink.name, why, lost)
