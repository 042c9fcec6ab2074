"""Which rollouts run when: admission, groups, early cancels and restarts, within the limits of a stream."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import aclosing

from gym_sdk.errors import GymError
from gym_sdk.rollout.beginning import input_items
from gym_sdk.rollout.deadline import until_ended, was_cancelled
from gym_sdk.rollout.flight import Flight
from gym_sdk.rollout.grouping import is_scored, score_group
from gym_sdk.rollout.groups import OpenGroup
from gym_sdk.rollout.options import StreamOptions
from gym_sdk.rollout.ramp import Ramp
from gym_sdk.rollout.record import Record
from gym_sdk.rollout.run import RolloutRun
from gym_sdk.rollout.source import TaskSource, read_tasks
from gym_sdk.rollout.spec import RolloutSpec
from gym_sdk.rollout.staleness import AgeLimit
from gym_sdk.schema import Cancellation, Rollout, RolloutKey, Task

__all__ = ["Scheduler"]

_log = logging.getLogger(__name__)

_STARTS_PER_TURN = 32
"""Rollouts that begin in one turn of the event loop."""
_LEAVE_S = 10.0
"""How long cancelled rollouts may take to end before they are cancelled again, apart from teardown."""
_LEAVE_TRIES = 3


class Scheduler:
    """Starts rollouts while there is room, and puts their groups together.

    Everything happens in one event loop. Rollouts are tasks of their own; `close` ends them all.

    Args:
        tasks: the source.
        spec: everything about a rollout but its task.
        options: groups, order, staleness.
        record: told of each rollout that ended, asked for what is there already.
        deliver: called with each group that is done; it holds a place until `release`.
        changed: called when the scheduler failed, or has nothing left to do.

    Attributes:
        positions: where in the source the task with an id, and an epoch of its own, stood.
        failure: what ended the scheduler before its work was done.
        source_error: why the source ended early.
        closed: whether `close` was called.
        dropped: how many flat groups were not delivered.
    """

    def __init__(
        self,
        tasks: TaskSource,
        spec: RolloutSpec,
        options: StreamOptions,
        record: Record,
        *,
        deliver: Callable[[OpenGroup], None],
        changed: Callable[[], None],
    ) -> None:
        self._tasks = tasks
        self._spec = spec
        self._options = options
        self._record = record
        self._deliver = deliver
        self._changed = changed
        self._limit = Ramp(spec.limits.concurrency, options.schedule.ramp_s, self._schedule_fill)
        self._held = 0  # groups that are done and not taken
        self._pending: deque[tuple[OpenGroup, int]] = deque()
        self._flights: dict[Flight, None] = {}  # in the order of their start
        self._loop: asyncio.AbstractEventLoop
        self._age = AgeLimit(options.staleness, spec.clock)
        self._open: dict[OpenGroup, dict[int, Flight]] = {}  # with what is in flight of it
        self._scoring: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._fill_scheduled = False
        self._starts_left = _STARTS_PER_TURN
        self._exhausted = False
        self._admitted = 0
        self._in_a_row = 0
        self._reader: asyncio.Task[None] | None = None
        self.positions: dict[tuple[str, int], int] = {}
        self.failure: BaseException | None = None
        self.source_error: Exception | None = None
        self.dropped = 0
        self.closed = False

    @property
    def idle(self) -> bool:
        """Whether all tasks were admitted and all their groups delivered or dropped."""
        return self._exhausted and not self._open

    def start(self) -> None:
        """Begin to admit tasks."""
        self._loop = asyncio.get_running_loop()
        self._limit.start()
        self._reader = self._loop.create_task(self._read(), name="gym-sdk: reading tasks")
        self._fill()

    def fail(self, error: BaseException) -> None:
        """End everything that is in flight; what is delivered already stays."""
        if self.failure is not None or self.closed:
            _log.warning("after the end of a stream: %r", error)
            return
        self.failure = error
        self._stop()
        self._changed()

    async def close(self) -> None:
        """Cancel what is in flight, and return when it has ended. What swallows that is cancelled again."""
        self.closed = True
        self._stop()
        has_teardown = self._spec.environment.teardown is not None
        first_s = _LEAVE_S + (self._spec.deadlines.setup_s if has_teardown else 0.0)
        await until_ended(self._running, (first_s, *[_LEAVE_S] * (_LEAVE_TRIES - 1)))

    def release(self, group: OpenGroup) -> bool:
        """Give back the place of a group that was delivered; False if it is too old, and sampled anew."""
        self._held -= 1
        stale, renewed = self._renew(group)
        if not renewed:
            for index in stale:
                group.done[index].cancel(Cancellation.STALE)
            self._record.forget(group)
        self._schedule_fill()
        return not renewed

    def weights_changed(self, now: int) -> None:
        """Sample anew what is too old by now: rollouts in flight, or finished before their group is."""
        for flight in list(self._flights):
            if self._age.is_born_too_early(flight.run.born, now):
                flight.cancel(Cancellation.STALE)
        for group in list(self._open):
            if not group.is_done:  # otherwise it is being scored, and looked at when it is taken
                self._renew(group)

    # admission

    async def _read(self) -> None:
        try:
            await self._admit_all()
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            self.source_error = GymError("the task source was cancelled, but not by the stream")
        except Exception as error:
            _log.warning("the task source failed after %d tasks: %s", len(self.positions), error)
            self.source_error = error
        except BaseException as error:
            self.fail(error)
        self._exhausted = True
        if self.idle:
            self._changed()

    async def _admit_all(self) -> None:
        """Open a group for each task while there is room."""
        async with aclosing(read_tasks(self._tasks, self._options.schedule, self.positions)) as tasks:
            while True:
                await self._room.wait()
                pair = await anext(tasks, None)
                if pair is None:
                    return
                if self._admit(*pair):
                    await asyncio.sleep(0)  # reading stored rollouts takes time

    def _admit(self, task: Task, epoch: int) -> bool:
        """Open a task's group; return whether some of it was stored."""
        if not isinstance(task.input, str):
            input_items(task)  # what is no task at all ends the source, not a rollout
        options = self._options
        group = OpenGroup(task, epoch, self._admitted, options.group_size, options.dynamic)
        self._admitted += 1
        self._record.restore(group, group.indices)
        self._open[group] = {}
        stored = bool(group.done)
        self._pending.extend((group, index) for index in group.start())
        if group.is_done:
            self._finish_group(group)
        self._fill()
        return stored

    def _schedule_fill(self) -> None:
        if not self._fill_scheduled:
            self._fill_scheduled = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._fill_scheduled = False
        self._starts_left = _STARTS_PER_TURN
        self._fill()

    def _fill(self) -> None:
        """Start what is pending while there is room, so much in one turn of the loop; then ask for more."""
        try:
            self._start_pending()
        except Exception as error:
            self.fail(error)
        ahead = self._options.schedule.ahead
        is_ahead = ahead is not None and len(self._open) + self._held >= ahead
        if self._has_room() and self._starts_left and not self._pending and not is_ahead:
            self._room.set()
        else:
            self._room.clear()

    def _start_pending(self) -> None:
        while self._pending and self._has_room():
            if not self._starts_left:
                return
            group, index = self._pending.popleft()
            if index in group.running:
                self._launch(group, index)
                self._starts_left -= 1
                self._schedule_fill()  # the next turn has starts of its own

    def _has_room(self) -> bool:
        if self.closed or self.failure is not None:
            return False
        return len(self._flights) + len(self._scoring) + self._held < self._limit.now

    # rollouts

    def _launch(self, group: OpenGroup, index: int) -> None:
        key = RolloutKey(group.task.id or "", group.epoch, index)
        run = RolloutRun(
            group.task,
            self._spec,
            index=index,
            epoch=group.epoch,
            order=group.order,
            begun=self._begun(group, key),
        )
        flight = Flight(group, index, run)
        self._flights[flight] = None
        self._open[group][index] = flight
        name = f"rollout {index} of task {group.task.id}"
        flight.task = self._loop.create_task(self._fly(flight), name=name)

    def _begun(self, group: OpenGroup, key: RolloutKey) -> Rollout | None:
        """Return an attempt to go on from, unless it is too old, or its like was already."""
        if key.index in group.restarts:
            return None
        begun = self._record.begun(group.task, key)
        return None if begun is None or self._age.is_too_old_to_go_on(begun) else begun

    async def _fly(self, flight: Flight) -> None:
        """Run one rollout, and go on with its group."""
        rollout = flight.run.rollout
        flight.has_begun = True
        try:
            if flight.reason is None:
                await flight.run.run()
            else:
                rollout.cancel(flight.reason)
        except asyncio.CancelledError:
            rollout.cancel(flight.reason or Cancellation.CALLER)
        except BaseException as error:
            self._land(flight)
            self.fail(error)
            return
        self._land(flight)
        try:
            self._finish(flight, rollout)
        except BaseException as error:
            self.fail(error)

    def _land(self, flight: Flight) -> None:
        del self._flights[flight]
        flights = self._open.get(flight.group, {})
        if flights.get(flight.index) is flight:
            del flights[flight.index]
        self._schedule_fill()

    def _finish(self, flight: Flight, rollout: Rollout) -> None:
        group, index = flight.group, flight.index
        wanted = index in group.running and not self.closed and self.failure is None
        self._age.note(rollout, learn=True)
        if wanted and (flight.reason is Cancellation.STALE or self._age.is_too_old(rollout)):
            rollout.cancel(Cancellation.STALE)
        self._record.note(rollout, order=group.order * group.size + len(group.done))
        if not wanted:
            return
        if rollout.cancellation is Cancellation.STALE and self._may_restart(group, index):
            self._restart(group, index)
            return
        group.finish(index, rollout)
        surplus = group.surplus
        if surplus is not None and group.running:
            self._cancel_rest(group, surplus)
        if group.is_done:
            self._finish_group(group)

    def _cancel_rest(self, group: OpenGroup, reason: Cancellation) -> None:
        group.running.clear()
        for flight in list(self._open[group].values()):
            flight.cancel(reason)

    def _restart(self, group: OpenGroup, index: int) -> None:
        group.restart(index)
        self._pending.appendleft((group, index))
        self._schedule_fill()

    def _may_restart(self, group: OpenGroup, index: int) -> bool:
        return self._age.may_restart(group.restarts.get(index, 0))

    def _renew(self, group: OpenGroup) -> tuple[list[int], list[int]]:
        """Return the group's rollouts that are too old, and those of them that are sampled anew now."""
        stale = [rollout.index for rollout in group.chosen() if self._age.is_too_old(rollout)]
        renewed = [index for index in stale if self._may_restart(group, index)]
        if renewed:
            self._open.setdefault(group, {})
        for index in renewed:
            self._restart(group, index)
        return stale, renewed

    # groups

    def _finish_group(self, group: OpenGroup) -> None:
        """Score, refill, drop or deliver a group of which nothing runs any more."""
        if self._spec.environment.group_verifier is None or is_scored(group):
            self._close_group(group)
            return
        task = self._loop.create_task(self._score(group), name=f"group verifier of task {group.task.id}")
        self._scoring.add(task)
        task.add_done_callback(self._scoring.discard)

    async def _score(self, group: OpenGroup) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            scored = await score_group(group, self._spec)
            self._record.note_scored(scored, order=group.order * group.size)
            self._scoring.discard(task)  # its place is free for what follows
            self._close_group(group)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.fail(error)

    def _close_group(self, group: OpenGroup) -> None:
        more = group.refill()
        if more:
            self._record.restore(group, more)
            self._pending.extend((group, index) for index in more if index in group.running)
            self._schedule_fill()
            if group.is_done:
                self._finish_group(group)
            return
        self._open.pop(group, None)
        if group.drops:
            self._record.forget(group)
            self._drop(group)
        else:
            self._in_a_row = 0
            self._held += 1
            self._deliver(group)
        if self.idle:
            self._changed()
        self._schedule_fill()

    def _drop(self, group: OpenGroup) -> None:
        self.dropped += 1
        self._in_a_row += 1
        most = self._options.dynamic.max_dropped
        if most is not None and self._in_a_row >= most:
            self.fail(
                GymError(
                    f"{self._in_a_row} groups in a row had the same reward throughout, and were dropped; the "
                    f"last is task {group.task.id!r}. Are the tasks too easy or too hard, or does the "
                    "verifier always say the same? (DynamicSampling.max_dropped)"
                )
            )

    # the end

    def _stop(self) -> None:
        self._limit.stop()
        self._pending.clear()
        self._room.clear()
        for task in (self._reader, *self._scoring):
            if task is not None:
                task.cancel()
        for flight in list(self._flights):
            flight.cancel(Cancellation.CALLER)

    def _running(self) -> set[asyncio.Task[None]]:
        tasks = {flight.task for flight in self._flights} | self._scoring | {self._reader}
        current = asyncio.current_task()
        return {task for task in tasks if task is not None and not task.done() and task is not current}
