"""One group: which rollouts it still needs, and when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Cancellation, Group, Outcome, Rollout, Task

__all__ = ["DynamicSampling", "OpenGroup", "is_flat", "is_scorable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicSampling:
    """What happens to groups that teach nothing, and to rollouts that keep a group waiting.

    A group is flat if all of its rewards are the same: its advantages are 0 (dynamic sampling; DAPO, arXiv
    2503.14476, section 3.2).

    Raises:
        ConfigurationError: a value is out of range.
    """

    spare: int = 0
    """Rollouts of each group that are started beyond its size. When as many as the size have finished, the
    rest is cancelled; spares also stand in for rollouts that failed. Mind the bias: short rollouts finish
    first."""
    stop_flat_after: int | None = None
    """When this many rewards of a group are there and all the same, the rest of it is cancelled."""
    refill: int = 0
    """More rollouts, at most, of a group that is flat: sampled in one go."""
    flat: Literal["deliver", "drop"] = "deliver"
    """What becomes of a group that is flat in the end. Dropped ones are counted, and stay in the store."""
    max_dropped: int | None = 1024
    """After this many dropped groups without one to deliver in between, the stream ends with an error: the
    policy solves all tasks, or none. None: never."""

    def __post_init__(self) -> None:
        for name, least in (("spare", 0), ("refill", 0), ("stop_flat_after", 2), ("max_dropped", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"DynamicSampling.{name} must be at least {least}, not {value}")
        if self.flat not in ("deliver", "drop"):
            raise ConfigurationError(f"DynamicSampling.flat must be 'deliver' or 'drop', not {self.flat!r}")


def is_scorable(rollout: Rollout) -> bool:
    """Whether a rollout came to an end of its own, so that it has a reward, or could have one."""
    return rollout.outcome is Outcome.COMPLETED or rollout.outcome is Outcome.TRUNCATED


def is_flat(rollouts: Iterable[Rollout], least: int = 2) -> bool:
    """Whether there are at least so many rewards, and all are the same."""
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return len(rewards) >= least and min(rewards) == max(rewards)


class OpenGroup:
    """The rollouts of one task, from the first start to delivery. Starts and cancels nothing by itself.

    Args:
        task: whose group it is.
        epoch: how often the task's group was attempted before.
        order: when it was admitted.
        size: how many rollouts it shall have.
        dynamic: spares, refills and early stops.
    """

    __slots__ = ("_dynamic", "_refilled", "done", "epoch", "order", "restarts", "running", "size", "task")

    def __init__(self, task: Task, epoch: int, order: int, size: int, dynamic: DynamicSampling) -> None:
        self.task = task
        self.epoch = epoch
        self.order = order
        self.size = size
        self._dynamic = dynamic
        self._refilled = False
        self.running: set[int] = set()
        """Indices that are started, or wait for it."""
        self.done: dict[int, Rollout] = {}
        """Those that are finished, by index, in the order of finishing."""
        self.restarts: dict[int, int] = {}
        """How often a rollout was sampled anew because it was too old."""

    @property
    def indices(self) -> range:
        """The rollouts that belong to it, whether they are needed or not."""
        return range(self.size + self._dynamic.spare)

    def start(self) -> list[int]:
        """Return the indices to start now, given what is done already."""
        if self.is_full or self.stops_flat:
            return []
        return self._starting(index for index in self.indices if index not in self.done)

    def _starting(self, indices: Iterable[int]) -> list[int]:
        chosen = list(indices)
        self.running.update(chosen)
        return chosen

    def restart(self, index: int) -> None:
        """Take a rollout out, to be sampled anew."""
        self.done.pop(index, None)
        self.restarts[index] = self.restarts.get(index, 0) + 1
        self.running.add(index)

    def finish(self, index: int, rollout: Rollout) -> None:
        """Note that a rollout is done."""
        self.running.discard(index)
        self.done[index] = rollout

    @property
    def is_full(self) -> bool:
        """Whether it has all the rollouts that it shall have."""
        return sum(map(is_scorable, self.done.values())) >= self.size

    @property
    def stops_flat(self) -> bool:
        """Whether it is flat so far, and no more of it shall be sampled."""
        least = self._dynamic.stop_flat_after
        return least is not None and not self._refilled and is_flat(self.done.values(), least)

    @property
    def surplus(self) -> Cancellation | None:
        """Why what still runs is not needed any more; None while it is."""
        if self.is_full:
            return Cancellation.STRAGGLER
        return Cancellation.FLAT if self.stops_flat else None

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing, apart from a refill."""
        return not self.running

    def refill(self) -> list[int]:
        """Return the indices to start because the group is flat; none if it is not, or was refilled."""
        more = self._dynamic.refill
        if not more or self._refilled or not is_flat(self.chosen()):
            return []
        self._refilled = True
        first = self.indices.stop  # not an index of one that was cancelled, and may not have ended yet
        self.size += more
        return self._starting(range(first, first + more))

    def chosen(self) -> list[Rollout]:
        """Return the rollouts to deliver, by index.

        Those that finished first; failed and cancelled ones only where these are too few.
        """
        scorable = [rollout for rollout in self.done.values() if is_scorable(rollout)][: self.size]
        missing = self.size - len(scorable)
        others = [rollout for rollout in self.done.values() if not is_scorable(rollout)][:missing]
        return sorted((*scorable, *others), key=lambda rollout: rollout.index)

    @property
    def drops(self) -> bool:
        """Whether it is flat in the end, and shall not be delivered."""
        return self._dynamic.flat == "drop" and is_flat(self.chosen())

    def close(self) -> Group:
        """Return what is delivered."""
        return Group(task=self.task, epoch=self.epoch, rollouts=self.chosen())
