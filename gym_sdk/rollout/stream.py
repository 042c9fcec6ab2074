"""Many rollouts, as a stream of groups: the first finished is the first served."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sized
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Self

from gym_sdk.errors import ConfigurationError, DeadlineError
from gym_sdk.metrics import RunMetrics
from gym_sdk.rollout.collector import calm_collector
from gym_sdk.rollout.groups import OpenGroup
from gym_sdk.rollout.options import StreamOptions
from gym_sdk.rollout.record import Record
from gym_sdk.rollout.scheduler import Scheduler
from gym_sdk.rollout.source import TaskSource, check_source
from gym_sdk.rollout.spec import RolloutSpec
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.rollout.watchdog import LoopWatchdog, watch_loop
from gym_sdk.schema import Group, Rollout, Task

__all__ = ["RolloutStream"]

_log = logging.getLogger(__name__)


class RolloutStream:
    """An asynchronous context manager and iterator over groups.

    Leaving the context cancels every rollout in flight, at which the server aborts its generation, and waits
    until all have ended. If the task source fails, what was admitted before is delivered first, then the
    source's error is raised. What is no rollout's own outcome (an error of the store, the run's deadline)
    cancels what is in flight and is raised after the groups that had finished.

    Args:
        tasks: the source; it is read only as fast as groups are taken.
        spec: everything about a rollout but its task.
        options: groups, order, store, progress.

    Raises:
        ConfigurationError: the source is none, or cannot be read as often as the schedule asks; a begun
            rollout cannot go on.
    """

    def __init__(self, tasks: TaskSource, spec: RolloutSpec, options: StreamOptions) -> None:
        check_source(tasks, options.schedule)
        self._spec = spec
        self._options = options
        environment = spec.environment
        self._record = Record(
            options,
            total=_total(tasks, options),
            has_state=environment.has_state,
            scored_later=environment.group_verifier is not None,
        )
        self._scheduler = Scheduler(
            tasks, spec, options, self._record, deliver=self._deliver, changed=self._wake_all
        )
        self._ready: deque[OpenGroup] = deque()
        self._takers: deque[asyncio.Future[None]] = deque()
        self._stack: AsyncExitStack | None = None
        self._watchdog: LoopWatchdog | None = None
        self._raised = False

    @property
    def metrics(self) -> RunMetrics:
        """The numbers of the rollouts that ended so far."""
        return self._record.metrics

    @property
    def watch(self) -> TokenWatch:
        """Counts over these rollouts: forks, unparsed calls, ..."""
        return self._record.watch

    @property
    def watchdog(self) -> LoopWatchdog | None:
        """How the event loop fares, once the stream was entered."""
        return self._watchdog

    @property
    def partial(self) -> list[Rollout]:
        """Cancelled rollouts, if they are kept: `client.rollouts(..., begun=stream.partial)` goes on."""
        return self._record.partial

    @property
    def may_drop(self) -> bool:
        """Whether there may be tasks without a group: `DynamicSampling(flat="drop")`."""
        return self._options.dynamic.flat == "drop"

    @property
    def dropped(self) -> int:
        """How many flat groups were not delivered."""
        return self._scheduler.dropped

    async def __aenter__(self) -> Self:
        if self._stack is not None:
            raise ConfigurationError("a rollout stream can be entered only once")
        async with AsyncExitStack() as stack:
            stack.enter_context(calm_collector())
            self._watchdog = await stack.enter_async_context(watch_loop())
            stack.enter_context(self._record)
            clock = self._spec.clock
            if clock is not None:
                stack.callback(clock.listen(self._scheduler.weights_changed))
            if self._options.tracker is not None:
                stack.callback(self._track())
            stack.push_async_callback(self._scheduler.close)
            if (run_s := self._spec.deadlines.run_s) is not None:
                loop = asyncio.get_running_loop()
                stack.callback(loop.call_later(run_s, self._run_out, run_s).cancel)
            self._scheduler.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._stack is not None
        try:
            await self._stack.aclose()
        finally:
            self._wake_all()  # other consumers
        failure = self._scheduler.failure
        if failure is not None and not self._raised:
            if kind is None:
                raise failure
            _log.warning("the stream had failed when it was left: %r", failure)

    def position(self, task: Task) -> int:
        """Return where in the source the task of a group stood, from 0."""
        return self._scheduler.positions[task.id or "", task.epoch]

    def __aiter__(self) -> AsyncIterator[Group]:
        return self

    async def __anext__(self) -> Group:
        """Return the next group that is done.

        Raises:
            StoreError: a rollout could not be stored.
            DeadlineError: the run's deadline is over.
            GymError: too many groups in a row were dropped.
            Exception: whatever the task source raised.
        """
        if self._stack is None:
            raise ConfigurationError("enter the stream first: async with client.rollouts(...) as stream")
        while True:
            while self._ready:
                group = self._ready.popleft()
                if self._scheduler.release(group):
                    closed = group.close()
                    self._record.metrics.add_group(closed)
                    return closed
            self._raise_failure()
            if self._scheduler.idle or self._scheduler.closed:
                raise StopAsyncIteration
            await self._wait()

    def _run_out(self, run_s: float) -> None:
        if not self._scheduler.idle:  # otherwise all is done, and waits to be taken
            self._scheduler.fail(DeadlineError("the run", seconds=run_s))

    def _raise_failure(self) -> None:
        scheduler = self._scheduler
        if scheduler.failure is not None:
            self._raised = True
            raise scheduler.failure
        if scheduler.idle and scheduler.source_error is not None:
            error, scheduler.source_error = scheduler.source_error, None
            raise error

    async def _wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._takers.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.cancelled():
                with suppress(ValueError):  # `_wake` has passed it by already
                    self._takers.remove(future)
            else:
                self._wake()  # it was this taker's turn: the next one's, then
            raise

    def _deliver(self, group: OpenGroup) -> None:
        self._ready.append(group)
        self._wake()

    def _wake(self) -> None:
        while self._takers:
            future = self._takers.popleft()
            if not future.done():
                future.set_result(None)
                return

    def _wake_all(self) -> None:
        for _ in range(len(self._takers)):
            self._wake()

    def _track(self) -> Callable[[], None]:
        """Give the tracker the metrics again and again; return what ends it."""
        tracker, every_s = self._options.tracker, self._options.metrics_every_s
        assert tracker is not None
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def log() -> None:
            try:
                tracker.log(self._numbers())
            except Exception:  # the rollouts are worth more than their curves
                _log.exception("the tracker failed")

        def again() -> None:
            nonlocal timer
            log()
            timer = loop.call_later(every_s, again)

        def end() -> None:
            timer.cancel()
            log()

        timer = loop.call_later(every_s, again)
        return end

    def _numbers(self) -> dict[str, float]:
        numbers = self._record.metrics.metrics()
        if self._watchdog is not None:
            numbers |= self._watchdog.metrics()
        return numbers | {"groups/dropped": float(self.dropped)}


def _total(tasks: TaskSource, options: StreamOptions) -> int | None:
    epochs = options.schedule.epochs
    return (
        len(tasks) * options.group_size * epochs if isinstance(tasks, Sized) and epochs is not None else None
    )
