"""The replay buffer: groups that were rolled out and not trained on yet.

`trainer/replay.jsonl` is a store: a line for each rollout, which `gym-sdk view` and `read_rollouts` read.
`trainer/replay.json` says how its lines form groups, and which batch of tasks each group belongs to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from gym_sdk.errors import CheckpointError
from gym_sdk.schema import Group, Rollout
from gym_sdk.store.heads import read_line
from gym_sdk.store.journal import to_line

__all__ = ["read_replay", "write_replay"]

_INDEX = "trainer/replay.json"
_LINES = "trainer/replay.jsonl"


def write_replay(folder: Path, replay: Mapping[int, Sequence[Group]]) -> None:
    """Write the buffer into a checkpoint that is being made; groups without rollouts are left out.

    Token ids, log-probs and rewards come back bit for bit. As in every store, an answer or metadata that
    JSON cannot say is written as text. A metric that is not finite is left out.
    """
    groups = [
        (position, group) for position in sorted(replay) for group in replay[position] if group.rollouts
    ]
    index = [
        {"position": position, "epoch": group.epoch, "rollouts": len(group.rollouts)}
        for position, group in groups
    ]
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    with (folder / _LINES).open("wb") as file:
        for _, group in groups:
            file.writelines(to_line(_finite(rollout)) + b"\n" for rollout in group.rollouts)


def read_replay(path: Path) -> dict[int, list[Group]]:
    """Read the buffer: the groups of each batch of tasks, by its position, in the order in which they were.

    Raises:
        CheckpointError: a line is no rollout that this version reads.
    """
    replay: dict[int, list[Group]] = {}
    index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
    with (path / _LINES).open("rb") as file:
        rollouts = _rollouts(path, file)
        for entry in index:
            members = list(islice(rollouts, entry["rollouts"]))
            group = Group(task=members[0].task, rollouts=members, epoch=entry["epoch"])
            replay.setdefault(entry["position"], []).append(group)
    return replay


def _rollouts(path: Path, lines: Iterable[bytes]) -> Iterator[Rollout]:
    for number, line in enumerate(lines, start=1):
        try:
            yield read_line(line)
        except ValueError as error:
            raise CheckpointError(f"{_LINES}:{number} cannot be read: {error}", path=path) from error


def _finite(rollout: Rollout) -> Rollout:
    """Leave out what JSON would turn into null, which is no number when it is read."""
    fields = {}
    for name in ("metrics", "reward_components"):
        values: dict[str, float] = getattr(rollout, name)
        if not all(map(math.isfinite, values.values())):
            fields[name] = {key: value for key, value in values.items() if math.isfinite(value)}
    return rollout.model_copy(update=fields) if fields else rollout
