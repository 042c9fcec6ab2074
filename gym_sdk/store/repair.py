"""Finding lines that cannot be read, and taking them out of the way without losing them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gym_sdk.errors import StoreError
from gym_sdk.schema import RolloutKey
from gym_sdk.store.formats import LineFormat, Record, RecordState, format_of
from gym_sdk.store.heads import NewerVersionError, read_head, read_line
from gym_sdk.store.lock import open_exclusively
from gym_sdk.store.replacing import replacing
from gym_sdk.store.scanning import open_to_read

__all__ = ["Damage", "StoreReport", "check", "repair"]


@dataclass(frozen=True, slots=True)
class Damage:
    """A line that cannot be read."""

    line: int
    """Its number, from 1."""
    length: int
    """Its bytes in the file."""
    problem: str
    """What is wrong with it."""


@dataclass(slots=True)
class StoreReport:
    """What a store consists of."""

    path: Path
    lines: int = 0
    """Lines that are rollouts."""
    rollouts: int = 0
    """Different keys among them."""
    damaged: list[Damage] = field(default_factory=list)
    torn_bytes: int = 0
    """Length of a last line that is not whole: what a killed writer leaves, or one that is writing now."""

    @property
    def replaced(self) -> int:
        """Lines that a later one of the same key replaced."""
        return self.lines - self.rollouts


def check(path: str | Path) -> StoreReport:
    """Read every rollout of a store and report what cannot be read; nothing is changed.

    Raises:
        StoreError: the file cannot be opened.
        ConfigurationError: it is zstd and the extra `store` is not installed.
    """
    report = StoreReport(Path(path))
    for _ in _judged(report, format_of(path)):
        pass
    return report


def repair(path: str | Path) -> StoreReport:
    """Move the lines that cannot be read to the end of `<path>.damaged`, byte for byte; keep the others.

    The store is replaced as a whole once that file is on the disk, so a repair that is interrupted may be
    done again. A store without damage is not touched.

    Returns:
        What was found.

    Raises:
        StoreError: somebody writes to the store, or it cannot be read or written.
        ConfigurationError: it is zstd and the extra `store` is not installed.
    """
    path = Path(path)
    lines = format_of(path)
    with _locked(path):
        report = check(path)
        if not report.damaged and not report.torn_bytes:
            return report
        report = StoreReport(path)
        moved = path.with_name(path.name + ".damaged")
        try:
            with moved.open("ab") as aside, replacing(path) as kept:
                for record, problem in _judged(report, lines):
                    if problem is None:
                        kept.write(lines.encode(record.line.rstrip(b"\r\n")))
                    else:
                        aside.write(record.line if record.line.endswith(b"\n") else record.line + b"\n")
                aside.flush()
                os.fsync(aside.fileno())
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot be written: {error.strerror}", path=moved, errno=error.errno) from error
    return report


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = open_exclusively(path, create=False)
    try:
        yield
    finally:
        os.close(descriptor)


def _judged(report: StoreReport, lines: LineFormat) -> Iterator[tuple[Record, str | None]]:
    """Yield each record with what is wrong with it, and count them in the report."""
    keys: set[RolloutKey] = set()
    with open_to_read(report.path) as file:
        for record in lines.records(file):
            try:
                problem = _problem(record, keys)
            except NewerVersionError as error:
                raise StoreError(str(error), path=report.path, line=record.number) from error
            if problem is None:
                report.lines += 1
            elif record.state is RecordState.TORN:
                report.torn_bytes = record.length
            else:
                report.damaged.append(Damage(record.number, record.length, problem))
            report.rollouts = len(keys)
            yield record, problem


def _problem(record: Record, keys: set[RolloutKey]) -> str | None:
    if record.state in (RecordState.DAMAGED, RecordState.TORN):
        return record.problem or "not whole"
    try:
        read_head(record.line)
        keys.add(read_line(record.line).key)
    except NewerVersionError:
        raise
    except ValueError as error:
        return str(error)
    return None
