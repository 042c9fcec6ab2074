"""What is kept of rollouts that ended: the store, the counts, the partial ones; and what is there already."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from gym_sdk.errors import ConfigurationError, StoreError
from gym_sdk.metrics import RunMetrics
from gym_sdk.rollout.groups import OpenGroup, is_scorable
from gym_sdk.rollout.options import StreamOptions
from gym_sdk.rollout.progress import Progress
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import Cancellation, Outcome, Rollout, RolloutKey, Task
from gym_sdk.store import Journal, task_fingerprint

__all__ = ["Record"]

_log = logging.getLogger(__name__)


class Record:
    """Keeps what a stream's rollouts left behind. It is a context manager: entering opens the store.

    Args:
        options: store, progress, what to go on from.
        total: how many rollouts there will be, if that is known.
        has_state: whether the environment has state of its own, without which no attempt can go on.
        scored_later: whether rewards come from a group verifier; rollouts are stored with their group then.

    Attributes:
        metrics: of all rollouts that ended.
        watch: counts of what goes wrong in silence.
        partial: cancelled rollouts, if they are kept.
    """

    def __init__(
        self, options: StreamOptions, *, total: int | None, has_state: bool, scored_later: bool
    ) -> None:
        self._options = options
        self._total = total
        self._has_state = has_state
        self._scored_later = scored_later
        self._journal: Journal | None = None
        self._progress: Progress | None = None
        self._stack = ExitStack()
        self._begun = {rollout.key: rollout for rollout in options.begun}
        if has_state and self._begun:
            raise ConfigurationError(
                "begun rollouts cannot go on: their environment's state (setup) ended with them"
            )
        self.metrics = RunMetrics()
        self.watch = TokenWatch()
        self.partial: list[Rollout] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._options.store is not None:
                self._journal = stack.enter_context(Journal(self._options.store))
            if self._options.progress:
                self._progress = stack.enter_context(Progress(self._total))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._options.keep_partial:
            self.partial.extend(self._begun.values())  # nobody got to them
        self._stack.__exit__(kind, error, traceback)

    def restore(self, group: OpenGroup, indices: Iterable[int]) -> None:
        """Put those of the group's rollouts into it that are stored, and came to an end of their own.

        Raises:
            ConfigurationError: the store has another task under this id.
            StoreError: a line of the store cannot be read.
        """
        journal = self._journal
        if journal is None or not len(journal):
            return
        for index in indices:
            key = RolloutKey(group.task.id or "", group.epoch, index)
            outcome = journal.outcome(key)
            if outcome is None:
                continue
            if journal.fingerprint(key) != task_fingerprint(group.task):
                raise _another_task(str(journal.path), group.task)
            if outcome in (Outcome.COMPLETED, Outcome.TRUNCATED):
                rollout = journal.load(key)
                group.finish(index, rollout)
                self._begun.pop(key, None)
                self.metrics.add_rollout(rollout)
                if self._progress is not None:
                    self._progress.add(rollout)

    def begun(self, task: Task, key: RolloutKey) -> Rollout | None:
        """Return a cancelled attempt that the rollout with this key can go on from.

        Raises:
            ConfigurationError: it was an attempt at another task.
            StoreError: its line in the store cannot be read.
        """
        begun = self._begun.pop(key, None)
        if begun is not None:
            if task_fingerprint(begun.task) != task_fingerprint(task):
                raise _another_task("begun", task)
            return begun
        journal = self._journal
        if self._has_state or journal is None or journal.outcome(key) is not Outcome.CANCELLED:
            return None
        stored = journal.load(key)
        return stored if stored.model_calls else None

    def forget(self, group: OpenGroup) -> None:
        """Note that nothing of a group is needed any more."""
        if self._begun:
            for index in group.indices:
                self._begun.pop(RolloutKey(group.task.id or "", group.epoch, index), None)

    def note(self, rollout: Rollout, *, order: int) -> None:
        """Count a rollout that ended, and store it. What is scored with its group waits for `note_scored`.

        Raises:
            StoreError: it could not be stored.
        """
        if rollout.outcome is Outcome.CANCELLED:
            self.metrics.add_rollout(rollout)
            self._note_partial(rollout)
        elif not (self._scored_later and is_scorable(rollout)):
            self._note_finished(rollout, order)

    def note_scored(self, rollouts: Iterable[Rollout], *, order: int) -> None:
        """Count and store the rollouts of a group that was scored as a whole.

        Raises:
            StoreError: one could not be stored.
        """
        for rollout in rollouts:
            self._note_finished(rollout, order)

    def _note_finished(self, rollout: Rollout, order: int) -> None:
        self.metrics.add_rollout(rollout)
        self.watch.add(rollout, order=order)
        if self._progress is not None:
            self._progress.add(rollout)
        if self._journal is not None:
            self._journal.write(rollout)

    def _note_partial(self, rollout: Rollout) -> None:
        worth_it = rollout.cancellation is Cancellation.CALLER and rollout.model_calls
        if not self._options.keep_partial or not worth_it:
            return
        self.partial.append(rollout)
        if self._journal is not None:
            try:
                self._journal.write(rollout)
            except StoreError as error:
                _log.warning("the cancelled rollout %s was not stored: %s", rollout.id, error)


def _another_task(where: str, task: Task) -> ConfigurationError:
    return ConfigurationError(
        f"{where} has another task under the id {task.id!r}, with other input or instructions; give the "
        "tasks other ids, or the run another store"
    )
