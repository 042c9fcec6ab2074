"""Tables of rollouts and of groups: text for terminals, HTML for notebooks, dicts for everything else."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gym_sdk.metrics.groups import mean_reward, pass_at
from gym_sdk.schema import Group, Outcome, Rollout, Task

__all__ = ["Cell", "GroupKey", "Table", "group_table", "rollout_table", "tags_of"]

Cell: TypeAlias = str | int | float | None

GroupKey: TypeAlias = Callable[[Task], str | Iterable[str]]
"""Says under which name, or names, a task's group is counted."""

UNTAGGED = "(none)"


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """Columns, rows, and what to say below them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Each as long as `columns`. None is an empty cell."""
    note: str = ""

    def to_dicts(self) -> list[dict[str, Cell]]:
        """Return a dict for each row, by column: what `pandas.DataFrame` takes."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in self._shown()]
        lines = [f"| {' | '.join(row)} |" for row in escaped]
        lines.insert(1, "|" + " --- |" * len(self.columns))
        return "\n".join(lines) + (f"\n\n{self.note}" if self.note else "")

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        rows = self._shown()
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.note:
            lines.append(self.note)
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return f"<Table of {len(self.rows)} rows: {', '.join(self.columns)}>"

    def _repr_html_(self) -> str:
        head, *body = ([html.escape(cell) for cell in row] for row in self._shown())
        cells = "".join(f"<th>{cell}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>{note}"

    def _shown(self) -> list[list[str]]:
        return [list(self.columns), *([_show(cell) for cell in row] for row in self.rows)]


def rollout_table(rollouts: Sequence[Rollout], *, limit: int = 20, width: int = 60) -> Table:
    """Return a row for each of the first rollouts: how it ended, its reward, its answer or failure.

    Args:
        rollouts: in the order of the rows.
        limit: most rows; the note counts the others.
        width: most characters of an answer.
    """
    columns = ("task", "#", "outcome", "reward", "calls", "tools", "answer")
    hidden = len(rollouts) - limit
    note = f"... and {hidden} more" if hidden > 0 else ""
    return Table(columns, tuple(_rollout_row(rollout, width) for rollout in rollouts[:limit]), note)


def group_table(
    groups: Iterable[Group],
    *,
    by: GroupKey | None = None,
    ks: Sequence[int] = (),
    threshold: float = 1.0,
) -> Table:
    """Return a row for each name that `by` gives to tasks, and one for all.

    A group whose task has several names counts under each, so the rows need not add up to the last one.
    Reward and pass@k are means over the rollouts that have a reward; groups with fewer than k of them are
    left out of pass@k. A cell without a value is empty.

    Args:
        groups: what was rolled out.
        by: the names of a task's group; by default the task's tags (`tags_of`).
        ks: the columns pass@k.
        threshold: a rollout is correct from this reward on.

    Raises:
        ValueError: a k is less than 1.
    """
    names_of = by or tags_of
    every: list[Group] = []
    named: dict[str, list[Group]] = {}
    for group in groups:
        every.append(group)
        names = names_of(group.task)
        for name in dict.fromkeys((names,) if isinstance(names, str) else names) or (UNTAGGED,):
            named.setdefault(name, []).append(group)
    columns = ("name", "tasks", "rollouts", "scored", "reward", "error", *(f"pass@{k}" for k in ks), "failed")
    rows = [_group_row(name, named[name], ks, threshold) for name in sorted(named)]
    return Table(columns, (*rows, _group_row("all", every, ks, threshold)))


def tags_of(task: Task) -> tuple[str, ...]:
    """Return `task.metadata["tags"]`: a list of texts, or one text; none if there is no such entry."""
    tags: Any = task.metadata.get("tags") or ()
    return (tags,) if isinstance(tags, str) else tuple(str(tag) for tag in tags)


def _group_row(name: str, groups: Sequence[Group], ks: Sequence[int], threshold: float) -> tuple[Cell, ...]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    reward = mean_reward(groups)
    return (
        name,
        len(groups),
        len(rollouts),
        sum(rollout.ok for rollout in rollouts),
        reward.value,
        reward.error,
        *(pass_at(groups, k, threshold=threshold).value for k in ks),
        sum(rollout.outcome is Outcome.FAILED for rollout in rollouts),
    )


def _rollout_row(rollout: Rollout, width: int) -> tuple[Cell, ...]:
    outcome = str(rollout.outcome)
    why = rollout.truncation or rollout.cancellation
    if why is not None:
        outcome += f" ({why})"
    answer = rollout.output_text
    if rollout.failure is not None:
        answer = f"{rollout.failure.error}: {rollout.failure.message}"
    return (
        rollout.task_id,
        rollout.index,
        outcome,
        rollout.reward,
        len(rollout.model_calls),
        int(rollout.metrics.get("tool_calls", 0.0)),
        _short(answer, width),
    )


def _show(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _short(text: str, limit: int) -> str:
    line = " ".join(text[: 20 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
