"""Where the last line of each rollout lies, in a few hundred bytes for each and never the rollout."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from gym_sdk.schema import Outcome, RolloutKey

__all__ = ["Entry", "Index"]

_OUTCOMES = tuple(Outcome)
_CODES = {outcome: code for code, outcome in enumerate(_OUTCOMES)}


class Entry(NamedTuple):
    """The last line of one rollout.

    Attributes:
        offset: where it begins, in bytes.
        length: its bytes in the file.
        outcome: how the rollout ended.
        fingerprint: of its task; None if nobody computed it yet.
    """

    offset: int
    length: int
    outcome: Outcome
    fingerprint: str | None


class Index:
    """A mapping of keys to entries, in order of the entries' lines. Columns instead of objects."""

    def __init__(self) -> None:
        self._rows: dict[RolloutKey, int] = {}
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._outcomes = bytearray()
        self._fingerprints = array("Q")  # 0: unknown

    def add(self, key: RolloutKey, entry: Entry) -> bool:
        """Note the newest line of a key; whether it takes the place of another."""
        fingerprint = 0 if entry.fingerprint is None else int(entry.fingerprint, 16)
        row = self._rows.pop(key, None)
        if row is None:
            self._rows[RolloutKey(sys.intern(str(key.task_id)), key.epoch, key.index)] = len(self._offsets)
            self._offsets.append(entry.offset)
            self._lengths.append(entry.length)
            self._outcomes.append(_CODES[entry.outcome])
            self._fingerprints.append(fingerprint)
            return False
        self._rows[key] = row  # at the end: in order of the lines
        self._offsets[row], self._lengths[row] = entry.offset, entry.length
        self._outcomes[row], self._fingerprints[row] = _CODES[entry.outcome], fingerprint
        return True

    def get(self, key: RolloutKey) -> Entry | None:
        """Return a key's entry, if there is one."""
        row = self._rows.get(key)
        if row is None:
            return None
        fingerprint = self._fingerprints[row]
        return Entry(
            self._offsets[row],
            self._lengths[row],
            _OUTCOMES[self._outcomes[row]],
            f"{fingerprint:016x}" if fingerprint else None,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[RolloutKey]:
        return iter(self._rows)
