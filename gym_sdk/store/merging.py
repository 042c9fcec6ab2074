"""Several stores into one: the shards of several processes, or one store without its replaced lines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from gym_sdk.errors import ConfigurationError, StoreError
from gym_sdk.schema import Outcome, RolloutKey
from gym_sdk.store.formats import format_of
from gym_sdk.store.index import Entry
from gym_sdk.store.replacing import refuse_existing, replacing
from gym_sdk.store.scanning import LastLines

__all__ = ["FINISHED", "MergeReport", "merge"]

_log = logging.getLogger(__name__)

FINISHED = frozenset({Outcome.COMPLETED, Outcome.TRUNCATED})
"""Outcomes that a resumed run does not attempt again."""


@dataclass(slots=True)
class MergeReport:
    """What came together."""

    rollouts: int = 0
    """In the new store."""
    repeated: int = 0
    """Left out because another shard has the same rollout."""
    replaced: int = 0
    """Left out because another shard has a finished one for a failed one, or by `prefer`."""


class _Choice(NamedTuple):
    shard: int
    entry: Entry


def merge(
    paths: Sequence[str | Path], out: str | Path, *, prefer: Literal["first", "last"] | None = None
) -> MergeReport:
    """Merge stores into a new one, which appears when it is whole.

    In each store the last line of a key counts. Of one key in several stores, a finished rollout wins against
    a failed or cancelled one, and of several of the latter the one of the last store. The order is that of
    the stores, in each that of finishing. Memory holds an index of the keys, and one rollout.

    Args:
        paths: the stores; zstd or not, as their names say. They may still be written to: what is whole when
            they are opened counts.
        out: the new store.
        prefer: which store wins where two have different finished rollouts of one key. By default that is an
            error, because two runs wrote under the same keys.

    Raises:
        StoreError: two stores disagree about a key, one cannot be read, or `out` exists or cannot be written.
        ConfigurationError: there is nothing to merge, or a store is named twice.
    """
    _check_names(paths)
    out = Path(out)
    refuse_existing(out)
    report = MergeReport()
    with ExitStack() as stack:
        shards = [stack.enter_context(LastLines(path, fingerprints=True)) for path in paths]
        rules = _Rules(shards, prefer, report)
        chosen: dict[RolloutKey, _Choice] = {}
        for number, shard in enumerate(shards):
            for key, entry in zip(shard.index, shard.entries(), strict=True):
                other = chosen.get(key)
                choice = _Choice(number, entry)
                chosen[key] = choice if other is None else rules.decide(key, other, choice)
        with replacing(out) as file:
            lines = format_of(out)
            for number, shard in enumerate(shards):
                for key, entry in zip(shard.index, shard.entries(), strict=True):
                    if chosen[key].shard == number:
                        file.write(lines.encode(shard.line(entry).rstrip(b"\r\n")))
                        report.rollouts += 1
    _log.info("%s: %d rollouts of %d stores", out, report.rollouts, len(shards))
    return report


def _check_names(paths: Sequence[str | Path]) -> None:
    if not paths:
        raise ConfigurationError("there is no store to merge")
    resolved = [Path(path).resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ConfigurationError(f"{path} is named twice; merge each store once")


@dataclass(frozen=True, slots=True)
class _Rules:
    """Which of two lines of one key goes into the new store."""

    shards: Sequence[LastLines]
    prefer: Literal["first", "last"] | None
    report: MergeReport

    def decide(self, key: RolloutKey, one: _Choice, two: _Choice) -> _Choice:
        """Return the one that does, and count the other."""
        first, second = self.shards[one.shard], self.shards[two.shard]
        if one.entry.fingerprint != two.entry.fingerprint:
            raise StoreError(
                f"task {key.task_id!r} is another one in {second.path}: its input or instructions differ. "
                "Stores of different tasks under the same ids cannot be merged",
                path=first.path,
            )
        if _same(first, one.entry, second, two.entry):
            self.report.repeated += 1
            return one
        self.report.replaced += 1
        finished = one.entry.outcome in FINISHED, two.entry.outcome in FINISHED
        if finished[0] != finished[1]:
            return one if finished[0] else two
        if all(finished) and self.prefer is None:
            raise StoreError(
                f"{key} finished here and, differently, in {second.path}. If one of them is the right one, "
                "say which: prefer='first' or 'last' (--prefer), in the order of the stores",
                path=first.path,
            )
        return one if self.prefer == "first" else two


def _same(first: LastLines, one: Entry, second: LastLines, two: Entry) -> bool:
    """Whether two lines say the same: byte for byte, or as rollouts (an older version wrote one of them)."""
    if one.outcome is not two.outcome:
        return False
    return first.line(one).rstrip() == second.line(two).rstrip() or first.load(one) == second.load(two)
