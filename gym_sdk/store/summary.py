"""What is in a store, in numbers, without building its rollouts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gym_sdk.schema import Outcome
from gym_sdk.store.formats import format_of
from gym_sdk.store.heads import Head
from gym_sdk.store.index import Entry, Index
from gym_sdk.store.scanning import open_to_read, scan

__all__ = ["StoreSummary", "summarize"]


@dataclass(slots=True)
class StoreSummary:
    """The numbers of a store. The last line of each key counts."""

    lines: int = 0
    tasks: int = 0
    epochs: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=dict)
    rewarded: int = 0
    """Rollouts with a reward."""
    mean_reward: float | None = None
    """Over these."""
    size_bytes: int = 0

    @property
    def rollouts(self) -> int:
        """Different keys."""
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        numbers = {
            "tasks": self.tasks,
            "epochs": self.epochs,
            "rollouts": self.rollouts,
            **{str(outcome): count for outcome, count in self.outcomes.items()},
            "replaced": self.lines - self.rollouts,
        }
        text = "  ".join(f"{name}={count}" for name, count in numbers.items())
        mean = "none" if self.mean_reward is None else f"{self.mean_reward:.4g}"
        return f"{text}  mean_reward={mean}  size={self.size_bytes / 2**20:.1f}MiB"


def summarize(path: str | Path) -> StoreSummary:
    """Count what is in a store.

    Raises:
        StoreError: it cannot be read, or a line of it is damaged.
        ConfigurationError: it is zstd and the extra `store` is not installed.
    """
    summary = StoreSummary()
    index = Index()
    rewards: dict[int, float] = {}  # of the lines that count, by where they begin
    with open_to_read(path) as file:
        for record, head in scan(file, format_of(path), path):
            if head is not None:
                summary.lines += 1
                _count(index, rewards, record.offset, head)
        summary.size_bytes = file.seek(0, 2)
    outcomes = Counter(entry.outcome for key in index if (entry := index.get(key)) is not None)
    summary.outcomes = {outcome: outcomes[outcome] for outcome in Outcome}
    summary.tasks = len({key.task_id for key in index})
    summary.epochs = len({key.epoch for key in index})
    summary.rewarded = len(rewards)
    if rewards:
        summary.mean_reward = math.fsum(rewards.values()) / len(rewards)
    return summary


def _count(index: Index, rewards: dict[int, float], offset: int, head: Head) -> None:
    before = index.get(head.key)
    if before is not None:
        rewards.pop(before.offset, None)
    index.add(head.key, Entry(offset, 0, head.outcome, None))
    if head.reward is not None:
        rewards[offset] = head.reward
