"""Rollouts as Parquet files and Hugging Face datasets, for notebooks, tables and other trainers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gym_sdk.errors import StoreError
from gym_sdk.schema import Rollout, RolloutKey
from gym_sdk.store.heads import read_head
from gym_sdk.store.needs import needs_store_extra
from gym_sdk.store.replacing import refuse_existing, replacing
from gym_sdk.store.scanning import LastLines

if TYPE_CHECKING:
    from gym_sdk.store.tables import TableBuilder, TableName

__all__ = ["ExportReport", "Source", "to_dataset", "to_parquet"]

_log = logging.getLogger(__name__)

Source: TypeAlias = str | Path | Iterable[Rollout]
"""A store, or rollouts in memory."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported."""

    rollouts: Path
    """One row for each rollout."""
    sequences: Path
    """One row for each training row."""
    rollout_rows: int
    sequence_rows: int
    without_tokens: int
    """Rollouts with a reward that have no training rows, because their server told no tokens."""


def to_parquet(source: Source, folder: str | Path) -> ExportReport:
    """Write `rollouts.parquet` and `sequences.parquet` into a folder (columns: `gym_sdk.store.tables`).

    Of a store the last line of each key counts; memory holds an index, the advantages and a row group.

    Raises:
        StoreError: the store cannot be read, or a file cannot be written.
        TokenContractError: a rollout's token fields contradict each other.
        ConfigurationError: the extra `store` is not installed.
    """
    with needs_store_extra():
        from pyarrow import parquet

        from gym_sdk.store.tables import SCHEMAS
    folder = Path(folder)
    paths: dict[TableName, Path] = {name: folder / f"{name}.parquet" for name in SCHEMAS}
    with _opened(source) as rollouts, ExitStack() as files:
        builders = {name: rollouts.builder(name) for name in paths}
        writers = {}
        for name, path in paths.items():
            file = files.enter_context(replacing(path))
            writer = parquet.ParquetWriter(file, SCHEMAS[name], compression="zstd")
            writers[name] = files.enter_context(writer)
        for rollout in rollouts.each():
            for name, builder in builders.items():
                for batch in builder.add(rollout):
                    writers[name].write_batch(batch)
        for name, builder in builders.items():
            for batch in builder.rest():
                writers[name].write_batch(batch)
    without = builders["sequences"].without_tokens
    _say_without_tokens(without)
    return ExportReport(
        rollouts=paths["rollouts"],
        sequences=paths["sequences"],
        rollout_rows=builders["rollouts"].rows,
        sequence_rows=builders["sequences"].rows,
        without_tokens=without,
    )


def to_dataset(source: Source, table: TableName = "sequences", *, out: str | Path | None = None) -> Any:
    """Return one of the two tables as a Hugging Face `datasets.Dataset`.

    Args:
        source: a store, or rollouts in memory.
        table: `sequences` or `rollouts`; columns as in `gym_sdk.store.tables`.
        out: a new folder for `datasets.load_from_disk`; the dataset is then on the disk and mapped into
            memory. By default it is in memory.

    Raises:
        StoreError: the store cannot be read, or `out` exists or would have no rows.
        TokenContractError: a rollout's token fields contradict each other.
        ConfigurationError: the extra `store` is not installed.
    """
    with needs_store_extra():
        import datasets
        import pyarrow as pa

        from gym_sdk.store.tables import SCHEMAS
    with _opened(source) as rollouts:
        builder = rollouts.builder(table)
        batches = _batches(builder, rollouts.each())
        if out is None:
            dataset = datasets.Dataset(pa.Table.from_batches(batches, schema=SCHEMAS[table]))
        else:
            dataset = _on_disk(batches, SCHEMAS[table], Path(out))
    _say_without_tokens(builder.without_tokens)
    return dataset


def _batches(builder: TableBuilder, rollouts: Iterator[Rollout]) -> Iterator[Any]:
    for rollout in rollouts:
        yield from builder.add(rollout)
    yield from builder.rest()


def _on_disk(batches: Iterator[Any], schema: Any, out: Path) -> Any:
    """Write batches as a dataset's folder, which appears when it is whole, and open it."""
    import datasets
    import pyarrow as pa

    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        arrow, whole = Path(folder) / "table.arrow", Path(folder) / "whole"
        with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            rows = 0
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
        if not rows:
            raise StoreError("would have no rows, and `datasets` cannot load such a folder", path=out)
        with _without_bars():
            datasets.Dataset.from_file(str(arrow)).save_to_disk(whole)
        whole.rename(out)
    return datasets.load_from_disk(out)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _say_without_tokens(count: int) -> None:
    if count:
        _log.warning(
            "%d rollouts have no training rows: their model calls carry no token ids (train on a server that "
            "returns them, such as `gym-sdk serve`)",
            count,
        )


class _Opened:
    """Rollouts that can be gone through several times."""

    def __init__(self, source: LastLines | list[Rollout]) -> None:
        self._source = source

    def each(self) -> Iterator[Rollout]:
        """Yield the rollouts."""
        return self._source.rollouts() if isinstance(self._source, LastLines) else iter(self._source)

    def builder(self, table: TableName) -> TableBuilder:
        """Return what builds a table of them."""
        from gym_sdk.store.tables import TableBuilder, advantages_of

        return TableBuilder(table, advantages_of(self._rewards()) if table == "sequences" else {})

    def _rewards(self) -> Iterator[tuple[RolloutKey, float | None]]:
        source = self._source
        if isinstance(source, LastLines):
            for entry in source.entries():
                head = read_head(source.line(entry))
                yield head.key, head.reward
        else:
            for rollout in source:
                yield rollout.key, rollout.reward


@contextmanager
def _opened(source: Source) -> Iterator[_Opened]:
    if isinstance(source, str | Path):
        with LastLines(source) as lines:
            yield _Opened(lines)
    else:
        yield _Opened(list({rollout.key: rollout for rollout in source}.values()))
