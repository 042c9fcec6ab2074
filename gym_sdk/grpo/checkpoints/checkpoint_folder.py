"""The checkpoints of one run: which to write, which to keep, which to go on from."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from gym_sdk.errors import CheckpointError, ConfigurationError, StoreError
from gym_sdk.grpo.checkpoints.folders import previous_of
from gym_sdk.grpo.checkpoints.manifest import check_files
from gym_sdk.grpo.checkpoints.state import TrainerState, read_state
from gym_sdk.store.lock import open_exclusively

__all__ = ["CheckpointFolder"]

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVERS = re.compile(r"\.step-\d{6,}\.(?:[0-9a-f]{8}\.partial|removed)")


class _Kept(NamedTuple):
    step: int
    path: Path
    score: float | None


class CheckpointFolder:
    """The checkpoints of one run, `step-000123` and so on, in one folder. It is a context manager.

    Entering it locks the folder and clears up what a killed trainer left there. What reads (`latest`, `best`)
    needs no lock, so another process may evaluate while one trains.

        with CheckpointFolder("run/checkpoints", every=20) as checkpoints:
            if checkpoints.is_due(step):
                write_checkpoint(checkpoints.path(step), ...)
                checkpoints.prune()

    Args:
        folder: where they go; made when it is entered.
        every: how many steps lie between two of them. None: none is due by itself.
        keep_last: how many of the newest stay; at least 1.
        keep_best: how many of those with the highest scores stay too.

    Raises:
        ConfigurationError: a number is too small.
    """

    def __init__(
        self, folder: str | Path, *, every: int | None = None, keep_last: int = 3, keep_best: int = 1
    ) -> None:
        if every is not None and every < 1:
            raise ConfigurationError(f"every must be at least 1 step, or None, not {every}")
        if keep_last < 1:
            raise ConfigurationError(
                f"keep_last must be at least 1, not {keep_last}: a run resumes from the newest"
            )
        if keep_best < 0:
            raise ConfigurationError(f"keep_best must be at least 0, not {keep_best}")
        self.folder = Path(folder)
        self._every = every
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Lock the folder, make it if need be, and clear up.

        Raises:
            CheckpointError: another trainer has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = open_exclusively(self.folder / ".lock")
        except StoreError as error:
            raise CheckpointError(
                "another trainer writes its checkpoints here, or the folder cannot be locked. Give each run "
                "a folder of its own, or end the other one",
                path=self.folder,
            ) from error
        self._clear_up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoints with the highest scores stay."""
        return self._keep_best > 0

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after this step, counted from 1."""
        return self._every is not None and step % self._every == 0

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is to be written.

        Raises:
            CheckpointError: there are checkpoints of later steps, to which `latest` would return; or the
                folder is not entered.
        """
        self._require_lock()
        if later := [found for found, _ in self._found() if found > step]:
            raise CheckpointError(
                f"it has a checkpoint of step {later[-1]}, which is later than step {step}. Go on from it, "
                "give the new run a folder of its own, or remove the later ones with rewind",
                path=self.folder,
            )
        return self.folder / f"step-{step:06d}"

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint; None if there is none.

        Whole: all its files are there, in their sizes. What is not is skipped with a warning.
        """
        return next((path for _, path in reversed(self._found()) if _state_if_whole(path)), None)

    def best(self) -> Path | None:
        """Return the whole checkpoint with the highest score, the earlier of equals; None if none has one."""
        return next((kept.path for kept in _by_score(self._whole())), None)

    def prune(self) -> None:
        """Remove what is neither among the newest nor among the best; call it after each write.

        Checkpoints that are not whole neither count nor go. A failing removal is a warning.

        Raises:
            CheckpointError: the folder is not entered.
        """
        self._require_lock()
        whole = list(self._whole())
        kept = {*whole[-self._keep_last :], *_by_score(whole)[: self._keep_best]}
        for checkpoint in whole:
            if checkpoint not in kept:
                _remove(checkpoint.path)

    def rewind(self, step: int) -> None:
        """Remove the checkpoints of later steps: for a run that goes on from an earlier one.

        Raises:
            CheckpointError: the folder is not entered.
        """
        self._require_lock()
        for found, path in self._found():
            if found > step:
                _log.info("removing %s: the run goes on from step %d", path, step)
                _remove(path)

    def _found(self) -> list[tuple[int, Path]]:
        """Return what is there, in order of steps."""
        found: dict[int, Path] = {}
        for path in self.folder.glob("step-*"):
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
        for path in self.folder.glob(".step-*.previous"):  # a kill between the renames of a replacement
            if match := _NAME.fullmatch(path.name.removeprefix(".").removesuffix(".previous")):
                found.setdefault(int(match[1]), path)
        return sorted(found.items())

    def _whole(self) -> Iterator[_Kept]:
        for step, path in self._found():
            if state := _state_if_whole(path):
                yield _Kept(step, path, state.score)

    def _clear_up(self) -> None:
        for path in list(self.folder.glob(".step-*")):
            if _LEFTOVERS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        for step, path in self._found():
            whole = self.folder / f"step-{step:06d}"
            if path != whole:
                path.replace(whole)
            shutil.rmtree(previous_of(whole), ignore_errors=True)

    def _require_lock(self) -> None:
        if self._lock is None:
            raise CheckpointError(
                "this folder is not entered; use `with CheckpointFolder(...) as checkpoints:`",
                path=self.folder,
            )


def _state_if_whole(path: Path) -> TrainerState | None:
    try:
        check_files(path, contents=False)
        return read_state(path)
    except CheckpointError as error:
        _log.warning("this checkpoint is left out: %s", error)
        return None


def _by_score(checkpoints: Iterable[_Kept]) -> list[_Kept]:
    """Return those with a score, the best first, of equals the earliest."""
    scored = [(-checkpoint.score, checkpoint) for checkpoint in checkpoints if checkpoint.score is not None]
    return [checkpoint for _, checkpoint in sorted(scored, key=lambda pair: (pair[0], pair[1].step))]


def _remove(path: Path) -> None:
    """Remove a checkpoint; under another name first, so that none is ever seen half removed."""
    doomed = path.with_name(f".{path.name.strip('.')}.removed")
    try:
        if path.exists():
            path.replace(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        _log.warning("%s could not be removed: %s", path, error)
