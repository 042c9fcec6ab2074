"""A watchdog of the event loop: measures how late it is, and names the function that blocks it."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

from anyio.lowlevel import RunVar

__all__ = ["LagHistogram", "LoopWatchdog", "watch_loop"]

_log = logging.getLogger(__name__)

_BEATS_PER_THRESHOLD = 10
_LOOKS_PER_THRESHOLD = 4
_JOIN_TIMEOUT_S = 1.0
_MAX_MISSED = 1_000  # heartbeats that one block counts for
_MAX_PLACES = 1_000
_ASYNCIO = str(Path(asyncio.__file__).parent)
_LOOP_FUNCTIONS = frozenset({"_run", "_run_once", "run_forever", "run_until_complete", "run"})


class LagHistogram:
    """Durations in seconds, in buckets that each span 9 % (eight for each factor of two): bounded memory.

    Attributes:
        count: how many durations were added.
        max_s: the longest, exactly.
    """

    _SMALLEST_S = 1e-4
    _PER_OCTAVE = 8
    _BUCKETS = 24 * _PER_OCTAVE  # up to 28 minutes

    def __init__(self) -> None:
        self.count = 0
        self.max_s = 0.0
        self._buckets = [0] * (self._BUCKETS + 1)

    def add(self, seconds: float) -> None:
        """Add one duration."""
        bucket = 0
        if seconds > self._SMALLEST_S:
            bucket = math.ceil(math.log2(seconds / self._SMALLEST_S) * self._PER_OCTAVE)
        self._buckets[min(bucket, self._BUCKETS)] += 1
        self.count += 1
        self.max_s = max(self.max_s, seconds)

    def percentile(self, share: float) -> float:
        """Return the duration that this share (0 to 1) does not exceed, up to 9 % too long; 0 if empty."""
        left = share * self.count
        for bucket, count in enumerate(self._buckets):
            left -= count
            if count and left <= 0:
                return min(self.max_s, self._SMALLEST_S * 2 ** (bucket / self._PER_OCTAVE))
        return self.max_s


@dataclass(slots=True)
class _Sight:
    """What the watching thread saw when the loop was late."""

    holder: object
    """The task or, outside of tasks, the code that ran."""
    due: float
    """The heartbeat that was missing."""
    since: float
    """When it was seen first, in the loop's time."""
    counted: bool = False


@dataclass(slots=True)
class _Pulse:
    """What the loop and the watching thread share. Each field has one writer."""

    due: float = 0.0
    """When the next heartbeat should be, in the loop's time. Written by the loop."""
    stop: threading.Event = field(default_factory=threading.Event)


class LoopWatchdog:
    """Watches the running event loop for as long as its `async with` block lasts.

    A heartbeat measures how late the loop is. A daemon thread looks at what the loop's thread does when the
    heartbeat stays out; if one step of one task, or one callback, holds the loop for longer than the
    threshold, the log names the function, once for each: the innermost that is neither this library's, nor
    Python's, nor an installed package's, if there is one. A loop that is only busy, with many short steps,
    gives no warning; its lag shows. Of C code that holds the interpreter's lock, the function that called its
    caller may be named: it is seen only afterwards.

    It costs one short callback per `threshold_s / 10`, and no more when nothing blocks.

    Args:
        threshold_s: from when on a step counts as blocking, in seconds. Shorter blocks are not noticed, those
            that are little longer not always.

    Attributes:
        lag_s: how late callbacks run, in seconds, for callbacks at evenly spread times: a block of ten
            seconds counts for all that it delayed, not as one.
        blocked: how often each function blocked, as `name (file:line)` with the line that was seen first.
    """

    def __init__(self, threshold_s: float = 0.5) -> None:
        self._threshold_s = threshold_s
        self._interval_s = threshold_s / _BEATS_PER_THRESHOLD
        self._pulse = _Pulse()
        self._places: dict[CodeType, str] = {}
        self._blocked_s = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self.lag_s = LagHistogram()
        self.blocked: Counter[str] = Counter()

    async def __aenter__(self) -> LoopWatchdog:
        if self._thread is not None:
            raise RuntimeError("a watchdog watches once; make another one")
        loop = asyncio.get_running_loop()
        self._plan(loop)
        self._thread = threading.Thread(
            target=self._watch, args=(loop, threading.get_ident()), name="gym-sdk watchdog", daemon=True
        )
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._handle is not None
        assert self._thread is not None
        self._handle.cancel()
        self._pulse.stop.set()
        self._record(asyncio.get_running_loop().time())
        self._thread.join(_JOIN_TIMEOUT_S)  # it wakes at once

    def metrics(self) -> dict[str, float]:
        """Return the lag so far: `loop_lag_p50_s`, `_p99_s`, `_max_s`, and `loop_blocked_s` in all."""
        return {
            "loop_lag_p50_s": self.lag_s.percentile(0.5),
            "loop_lag_p99_s": self.lag_s.percentile(0.99),
            "loop_lag_max_s": self.lag_s.max_s,
            "loop_blocked_s": self._blocked_s,
        }

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pulse.due = loop.time() + self._interval_s
        self._handle = loop.call_at(self._pulse.due, self._beat, loop)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._record(loop.time())
        self._plan(loop)

    def _record(self, now: float) -> None:
        lag = max(0.0, now - self._pulse.due)
        if lag >= self._threshold_s:
            self._blocked_s += lag
        # the heartbeats that were not made would have been late too, each by less than the one before
        for _ in range(_MAX_MISSED):
            self.lag_s.add(lag)
            lag -= self._interval_s
            if lag <= 0:
                break

    def _watch(self, loop: asyncio.AbstractEventLoop, thread_id: int) -> None:
        """Look at the loop's thread now and then. Runs in the watching thread."""
        sight: _Sight | None = None
        pause_s = self._threshold_s / _LOOKS_PER_THRESHOLD
        clock = _cpu_clock(thread_id)
        looked, used = loop.time(), clock()
        while not self._pulse.stop.wait(pause_s):
            # C code that holds the interpreter's lock also holds up this thread, which then comes too late to
            # see it twice; what the loop's thread computed meanwhile tells it from a machine that was asleep
            now, now_used = loop.time(), clock()
            alone_s = min(now - looked - pause_s, now_used - used)
            looked, used = now, now_used
            late = now - self._pulse.due
            if late < pause_s:
                sight = None
                continue
            sight = self._look(loop, thread_id, sight, alone_s)

    def _look(
        self, loop: asyncio.AbstractEventLoop, thread_id: int, before: _Sight | None, alone_s: float
    ) -> _Sight | None:
        frame = sys._current_frames().get(thread_id)
        callers = [] if frame is None else _callers(frame)
        if not callers:
            return None  # the loop waits: it is this thread, or the machine, that was late
        now, due = loop.time(), self._pulse.due
        task = asyncio.current_task(loop)
        holder = task if task is not None else callers[-1].f_code
        sight = before
        if sight is None or sight.holder is not holder or sight.due != due:
            sight = _Sight(holder, due, now - alone_s)
        # half of the threshold within one step: the first sight may have come that much after its start
        is_late = now - due >= self._threshold_s
        if not sight.counted and is_late and now - sight.since >= self._threshold_s / 2:
            sight.counted = True
            self._count(_culprit(callers), task)
        return sight

    def _count(self, frame: FrameType, task: asyncio.Task[Any] | None) -> None:
        place = self._places.get(frame.f_code)
        if place is not None:
            self.blocked[place] += 1
            return
        if len(self._places) >= _MAX_PLACES:
            return
        place = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        self._places[frame.f_code] = place
        self.blocked[place] += 1
        _log.warning(
            "the event loop was blocked for more than %g s by %s%s: nothing else runs meanwhile. Write it as "
            "a plain `def`, which runs in a thread, or declare it with gym_sdk.processes.in_process",
            self._threshold_s,
            place,
            f", in task {task.get_name()!r}" if task is not None else "",
        )


def _cpu_clock(thread_id: int) -> Callable[[], float]:
    """A clock of the processor time that a thread used, in seconds; it stands still where there is none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return lambda: 0.0
    return partial(time.clock_gettime, time.pthread_getcpuclockid(thread_id))


def _callers(frame: FrameType) -> list[FrameType]:
    """The frames of the callback that the loop runs, from the innermost outwards; none if it runs none."""
    found: list[FrameType] = []
    walk: FrameType | None = frame
    while walk is not None:
        code = walk.f_code
        if code.co_name in _LOOP_FUNCTIONS and code.co_filename.startswith(_ASYNCIO):
            waits = len(found) == 1 and found[0].f_code.co_name == "select"
            return [] if waits else found
        found.append(walk)
        walk = walk.f_back
    return []


def _culprit(callers: list[FrameType]) -> FrameType:
    """The innermost frame of the user's own code, else of an installed package, else of anything."""
    return min(callers, key=lambda caller: _distance(caller.f_code.co_filename))


@lru_cache(maxsize=4096)
def _distance(file: str) -> int:
    """How far a source file is from being the user's own code: 0 is their own."""
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    library = Path(__file__).parents[1]
    if file.startswith("<") and not file.startswith(("<ipython", "<stdin")):
        return 2
    if file.startswith((f"{library}/", f"{library.parent / 'backends'}/")):
        return 2
    if any(file.startswith(f"{package}/") for package in packages):
        return 2 if "/anyio/" in file else 1
    return 2 if file.startswith((sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))) else 0


@dataclass(slots=True)
class _Shared:
    watchdog: LoopWatchdog
    users: int = 0


_shared: RunVar[_Shared | None] = RunVar("gym_sdk watchdog", default=None)


@asynccontextmanager
async def watch_loop() -> AsyncIterator[LoopWatchdog]:
    """Watch the running event loop; all that do so at the same time share one watchdog.

    Its figures begin when the first of them came.

    Yields:
        The loop's watchdog.
    """
    shared = _shared.get()
    if shared is None:
        shared = _Shared(LoopWatchdog())
        await shared.watchdog.__aenter__()
        _shared.set(shared)
    shared.users += 1
    try:
        yield shared.watchdog
    finally:
        shared.users -= 1
        if not shared.users:
            _shared.set(None)
            await shared.watchdog.__aexit__(None, None, None)
