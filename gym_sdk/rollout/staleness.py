"""How old the weights are that sampled a rollout, counted in versions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Outcome, Rollout

__all__ = ["AgeLimit", "Staleness", "WeightClock", "oldest_version"]


@dataclass(frozen=True, slots=True)
class Staleness:
    """How old the weights of a rollout may be when it is delivered.

    Raises:
        ConfigurationError: a value is out of range.
    """

    max_versions: int
    """Most weight versions between the oldest token of a rollout and the newest weights; 0 is on-policy."""
    too_old: Literal["cancel", "mark"] = "cancel"
    """`cancel`: a rollout that is too old is cancelled as soon as that is certain, finished or not, and
    sampled anew. `mark`: it is delivered. In both cases `metrics["staleness"]` has the number of versions."""
    restarts: int = 2
    """How often one rollout is sampled anew; after that, it is delivered as cancelled."""

    def __post_init__(self) -> None:
        for name in ("max_versions", "restarts"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"Staleness.{name} must be 0 or more, not {getattr(self, name)}")
        if self.too_old not in ("cancel", "mark"):
            raise ConfigurationError(f"Staleness.too_old must be 'cancel' or 'mark', not {self.too_old!r}")


class WeightClock:
    """The order in which weight versions came.

    `GymClient.update_weights` advances it. Who pushes weights in another way calls `advance`; otherwise a
    version counts from the first token on that it sampled.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._has_first = False
        self._listeners: list[Callable[[int], None]] = []
        self.now = 0
        """How many updates there were."""

    def advance(self, version: str) -> None:
        """Note that these weights serve from now on; without effect if they are the newest already."""
        if version in self._numbers and self._numbers[version] == self.now:
            return
        self.now += 1
        self._numbers[version] = self.now
        for listener in list(self._listeners):
            listener(self.now)

    def number_of(self, version: str) -> int:
        """Return how many updates there were when these weights came.

        Of the versions that nobody told of, the first seen is taken for the one before all updates, and any
        other for the newest.
        """
        number = self._numbers.get(version)
        if number is None and not self._has_first:
            number = self._numbers[version] = 0
        self._has_first = True
        if number is None:
            self.advance(version)
            number = self.now
        return number

    def known_number_of(self, version: str) -> int | None:
        """Return the same without learning anything; None for versions that nobody told of."""
        return self._numbers.get(version)

    def listen(self, listener: Callable[[int], None]) -> Callable[[], None]:
        """Call a function with `now` at each update; return what ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)


def oldest_version(rollout: Rollout, clock: WeightClock, *, learn: bool = True) -> int | None:
    """Return the number of the oldest weights that sampled a token of the rollout, or None if none is known.

    Args:
        rollout: its tokens say which weights sampled them.
        clock: numbers the versions.
        learn: whether a version that the clock does not know is news to it; not so for what was sampled
            long ago.
    """
    number_of = clock.number_of if learn else clock.known_number_of
    oldest = None
    for call in rollout.model_calls:
        if call.tokens is not None:
            for span in call.tokens.weight_versions:
                number = number_of(span.version)
                if number is not None and (oldest is None or number < oldest):
                    oldest = number
    return oldest


class AgeLimit:
    """Says which rollouts are too old to be delivered, and which of them are sampled anew.

    Args:
        staleness: how old they may be; None: as old as they like.
        clock: tells how old they are; None: that is not asked.
    """

    def __init__(self, staleness: Staleness | None, clock: WeightClock | None) -> None:
        self._clock = clock
        self._is_asked = staleness is not None
        self._cancels = staleness is not None and staleness.too_old == "cancel"
        self._most = staleness.max_versions if staleness is not None else 0
        self._restarts = staleness.restarts if staleness is not None else 0

    def note(self, rollout: Rollout, *, learn: bool = False) -> None:
        """Put the age into `metrics["staleness"]`, if the weights are known."""
        oldest = None if self._clock is None else oldest_version(rollout, self._clock, learn=learn)
        if self._clock is not None and oldest is not None:
            rollout.metrics["staleness"] = float(self._clock.now - oldest)

    def is_too_old(self, rollout: Rollout) -> bool:
        """Whether a rollout must not be delivered as it is. Notes the age."""
        if not self._is_asked:
            return False
        self.note(rollout)
        ended = rollout.outcome is Outcome.COMPLETED or rollout.outcome is Outcome.TRUNCATED
        return self._cancels and ended and rollout.metrics.get("staleness", 0.0) > self._most

    def is_too_old_to_go_on(self, begun: Rollout) -> bool:
        """Whether an attempt that was cancelled holds tokens that are too old."""
        oldest = None if self._clock is None else oldest_version(begun, self._clock, learn=False)
        return self._clock is not None and self.is_born_too_early(oldest, self._clock.now)

    def is_born_too_early(self, born: int | None, now: int) -> bool:
        """Whether what began with these weights is too old by now, whatever comes of it."""
        return self._cancels and born is not None and now - born > self._most

    def may_restart(self, restarts: int) -> bool:
        """Whether a rollout that was sampled anew so often may be so once more."""
        return restarts < self._restarts
