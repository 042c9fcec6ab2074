"""Scoring stored rollouts again with another verifier: nothing is sampled anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.lowlevel import checkpoint

from gym_sdk.errors import ConfigurationError, DeadlineError, StoreError, VerifierError
from gym_sdk.schema import Outcome, Rollout, RolloutKey, Truncation
from gym_sdk.schema.rollout import Stage
from gym_sdk.store.heads import Head, read_head
from gym_sdk.store.index import Entry
from gym_sdk.store.journal import Journal
from gym_sdk.store.merging import FINISHED
from gym_sdk.store.replacing import publish, refuse_existing
from gym_sdk.store.scanning import LastLines
from gym_sdk.verifiers import Verifier, run_verifier, verifier_name

__all__ = ["ReverifyReport", "partial_path", "reverify"]

_log = logging.getLogger(__name__)

_VERIFYING = (Stage.VERIFIER, Stage.GROUP_VERIFIER)


@dataclass(slots=True)
class ReverifyReport:
    """What another verifier says about the same rollouts."""

    rollouts: int = 0
    """In the new store; the same keys as in the old one."""
    verified: int = 0
    """Scored anew, without error."""
    failed: int = 0
    """The verification failed: no reward."""
    kept: int = 0
    """Had failed before they could be verified, or were cancelled: as they were."""
    recovered: int = 0
    """Have a reward now and had none."""
    compared: int = 0
    """Have a reward in both stores; what follows is about these."""
    changed: int = 0
    """The two rewards differ."""
    mean_before: float | None = None
    mean_after: float | None = None

    def __str__(self) -> str:
        names = ("rollouts", "verified", "failed", "kept", "recovered", "compared", "changed")
        text = "  ".join(f"{name}={getattr(self, name)}" for name in names)
        if self.mean_before is None or self.mean_after is None:
            return text
        return f"{text}  mean_reward={self.mean_before:.4g} -> {self.mean_after:.4g}"


def partial_path(out: str | Path) -> Path:
    """Return where the new store lies until it is whole: `a.jsonl.zst` has `a.partial.jsonl.zst`."""
    out = Path(out)
    stem, dot, suffixes = out.name.partition(".")
    return out.with_name(f"{stem}.partial{dot}{suffixes}")


async def reverify(
    source: str | Path,
    verifier: Verifier,
    *,
    out: str | Path,
    concurrency: int = 64,
    deadline_s: float = 120.0,
) -> ReverifyReport:
    """Score the rollouts of a store with this verifier and write them into a new store.

    Rollouts that were completed or truncated are scored, and those that failed in the verifier; the others
    stay as they are. One whose verification raises or runs out of time becomes `failed`, without reward.
    `timing.verifier_s` is that of the new verification; `metrics` stay, with what the verifier adds.

    The new store is a journal beside `out` (see `partial_path`) until it is whole. If this is cancelled or
    killed, the same call goes on from there; whoever changes the verifier in between has to remove that file.

    Args:
        source: the store; it is only read. The last line of each key counts.
        verifier: as for a run; a plain function is called in a worker thread.
        out: the new store.
        concurrency: verifications at a time.
        deadline_s: for each verification.

    Raises:
        StoreError: a store cannot be read or written, `out` exists, or what is at `partial_path(out)` is of
            other rollouts.
        ConfigurationError: a limit is not positive.
    """
    if concurrency < 1 or not deadline_s > 0:
        raise ConfigurationError(f"limits must be positive, not {concurrency=} and {deadline_s=}")
    out = Path(out)
    refuse_existing(out)
    partial = partial_path(out)
    with LastLines(source, fingerprints=True) as old, Journal(partial) as new:
        _check_partial(old, new)
        if len(new):
            _log.info("%s: goes on after %d rollouts of an earlier call", partial, len(new))
        work = _missing(old, new)
        try:
            async with anyio.create_task_group() as workers:
                for _ in range(min(concurrency, len(old.index))):
                    workers.start_soon(_work, work, new, verifier, deadline_s)
        except BaseExceptionGroup as failures:  # a full disk fails every worker; one of them says it
            raise failures.exceptions[0] from None
        new.sync()
        with LastLines(partial) as done:
            report = _compare(old, done)
        refuse_existing(out)
        publish(partial, out)
    _log.info("%s: %s", out, report)
    return report


def _check_partial(old: LastLines, new: Journal) -> None:
    for key in new:
        entry = old.index.get(key)
        if entry is None or entry.fingerprint != new.fingerprint(key):
            raise StoreError(
                f"has {key}, which is not in {old.path} or of another task: an earlier call with the same "
                "`out` had another source. Remove this file to begin anew",
                path=new.path,
            )


def _missing(old: LastLines, new: Journal) -> Iterator[Rollout]:
    """Yield the rollouts that are not in the new store, one at a time; several tasks may take from it."""
    for entry in list(_entries_without(old, set(new))):
        yield old.load(entry)


def _entries_without(old: LastLines, done: set[RolloutKey]) -> Iterator[Entry]:
    return (entry for key, entry in zip(old.index, old.entries(), strict=True) if key not in done)


async def _work(work: Iterator[Rollout], new: Journal, verifier: Verifier, deadline_s: float) -> None:
    for rollout in work:
        await _rescore(rollout, verifier, deadline_s)
        new.write(rollout)
        await checkpoint()  # what is only copied must not keep the loop


async def _rescore(rollout: Rollout, verifier: Verifier, deadline_s: float) -> None:
    """Score one rollout in place, if there is something to score.

    Verifiers of groups would follow here, once all rollouts of a task and epoch have their own scores.
    """
    if not _can_be_scored(rollout.outcome, rollout.failure.where if rollout.failure else None):
        return
    rollout.outcome, rollout.truncation = _ended(rollout)
    rollout.failure, rollout.reward, rollout.reward_components = None, None, {}
    started = time.perf_counter()
    try:
        with anyio.move_on_after(deadline_s) as scope:
            reward = await run_verifier(verifier, rollout)
        if scope.cancel_called:
            raise DeadlineError(f"verifier {verifier_name(verifier)}", seconds=deadline_s)
    except (VerifierError, DeadlineError) as error:
        truncation = rollout.truncation
        rollout.fail(error, Stage.VERIFIER)
        rollout.truncation = truncation  # for a next time
    else:
        rollout.reward, rollout.reward_components = reward.value, dict(reward.components)
    finally:
        rollout.timing.verifier_s = time.perf_counter() - started


def _can_be_scored(outcome: Outcome, failed_in: str | None) -> bool:
    return outcome in FINISHED or (outcome is Outcome.FAILED and failed_in in _VERIFYING)


def _ended(rollout: Rollout) -> tuple[Outcome, Truncation | None]:
    """Return how the rollout itself ended, before a verifier failed."""
    if rollout.outcome in FINISHED:
        return rollout.outcome, rollout.truncation
    truncation = rollout.truncation
    if truncation is None and rollout.model_calls:
        last = rollout.model_calls[-1]
        if last.status == "incomplete":
            truncation = Truncation.TOKENS
        elif last.end_item < len(rollout.items):  # the tools ran, and no call was left to read them
            truncation = Truncation.TURNS
    return (Outcome.COMPLETED if truncation is None else Outcome.TRUNCATED), truncation


def _compare(old: LastLines, new: LastLines) -> ReverifyReport:
    report = ReverifyReport()
    before_sum = after_sum = 0.0
    for key in old.index:
        before, after = _head(old, key), _head(new, key)
        report.rollouts += 1
        if not _can_be_scored(before.outcome, before.failed_in):
            report.kept += 1
            continue
        report.verified += after.reward is not None
        report.failed += after.reward is None
        report.recovered += before.reward is None and after.reward is not None
        if before.reward is not None and after.reward is not None:
            report.compared += 1
            report.changed += before.reward != after.reward
            before_sum += before.reward
            after_sum += after.reward
    if report.compared:
        report.mean_before = before_sum / report.compared
        report.mean_after = after_sum / report.compared
    return report


def _head(lines: LastLines, key: RolloutKey) -> Head:
    entry = lines.index.get(key)
    assert entry is not None, "the new store has every key of the old one"
    return read_head(lines.line(entry))
