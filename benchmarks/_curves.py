"""Learning curves as a picture: reward over steps and over time, a line and a band for each mode."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["save_curves"]

_COLORS = {"sync": "tab:blue", "async": "tab:orange"}
_WINDOW = 3  # steps that a point is the mean of


def save_curves(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a row for each task; the same results give the same file.

    Args:
        results: what `train_once` returned.
        path: where the picture goes; its suffix says in which form.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # text as text, and ids that don't change from run to run
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gym-sdk"})
    tasks = list(dict.fromkeys(result["task"] for result in results))
    figure = Figure(figsize=(9, 2.6 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharey=True)
    for row, task in zip(grid, tasks, strict=True):
        for mode, color in _COLORS.items():
            runs = [result for result in results if (result["task"], result["mode"]) == (task, mode)]
            if runs:
                _draw(row[0], runs, "step", color)
                _draw(row[1], runs, "seconds", color)
        row[0].set(title=task, ylabel="mean reward", ylim=(0, 1.02))
        row[0].legend(loc="lower right", fontsize="small")
        for axes in row:
            axes.grid(alpha=0.3)
    grid[-1][0].set_xlabel("training step")
    grid[-1][1].set_xlabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: Any, runs: Sequence[dict[str, Any]], over: str, color: str) -> None:
    """Draw the median over seeds, the range around it, and the held-out rewards before and after."""
    steps = range(min(len(run["curve"]) for run in runs))
    x = [statistics.median(run["curve"][step][over] for run in runs) for step in steps]
    smooth = [_smooth([point["reward"] for point in run["curve"]]) for run in runs]
    columns = [[rewards[step] for rewards in smooth] for step in steps]
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    axes.plot(
        x, [statistics.median(column) for column in columns], color=color, label=f"{runs[0]['mode']}, {seeds}"
    )
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, lw=0)
    for place, when in ((0.0, "before"), (x[-1], "after")):
        rewards = [run[when]["reward"] for run in runs]
        axes.plot([place] * len(rewards), rewards, "o", color=color, markersize=4)


def _smooth(rewards: Sequence[float]) -> list[float]:
    """Return the mean of the last few rewards at each step."""
    return [statistics.fmean(rewards[max(0, step + 1 - _WINDOW) : step + 1]) for step in range(len(rewards))]
