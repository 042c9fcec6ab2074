"""The weight versions of a run in their order: how old is a token?"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["WeightHistory", "step_of", "version_of"]

_KEPT = 4096


def version_of(step: int) -> str:
    """Return the label of the weights that a step made."""
    return f"step-{step:06d}"


def step_of(version: str) -> int:
    """Return the step that made the weights with a label of `version_of`."""
    return int(version.removeprefix("step-"))


class WeightHistory:
    """Numbers the versions of the weights as they are made.

    Args:
        labels: the versions so far, oldest first; at least one.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self._numbers = {label: number for number, label in enumerate(self._labels)}

    @property
    def labels(self) -> list[str]:
        """The newest versions, oldest first: what a checkpoint keeps."""
        return self._labels[-_KEPT:]

    @property
    def newest(self) -> str:
        """The version of the weights that are being trained."""
        return self._labels[-1]

    @property
    def now(self) -> int:
        """The number of the newest version."""
        return len(self._labels) - 1

    def add(self, label: str) -> None:
        """Note a new version."""
        self._numbers[label] = len(self._labels)
        self._labels.append(label)

    def number_of(self, label: str) -> int | None:
        """Return the number of a version; None for one that is not of this run.

        An engine has such a version before the first push, and always if somebody else names its versions.
        """
        return self._numbers.get(label)

    def age_of(self, label: str) -> int | None:
        """Return how many versions came after this one; None for one that is not of this run."""
        number = self._numbers.get(label)
        return None if number is None else self.now - number
