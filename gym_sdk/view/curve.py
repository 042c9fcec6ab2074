"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gym_sdk.errors import ConfigurationError

__all__ = ["save_learning_curve"]


def save_learning_curve(
    rewards: Sequence[float],
    path: str | Path,
    *,
    held_out: Mapping[int, float] | None = None,
    title: str = "mean reward",
) -> Path:
    """Draw the mean reward of each step, and the held-out evaluations, into a PNG.

    Args:
        rewards: mean reward of the rollouts of each training step.
        path: where the picture goes.
        held_out: mean held-out reward by number of steps done.
        title: what stands above the picture.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError('a plot needs matplotlib: pip install "gym-sdk[demo]"') from error
    # The object interface: no global state, no display, no back end to choose.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(rewards) + 1)
    axes.plot(steps, rewards, color="tab:blue", alpha=0.8, label="training rollouts, each step")
    if held_out:
        points = sorted(held_out.items())
        axes.plot(
            [step for step, _ in points],
            [reward for _, reward in points],
            "o",
            markersize=8,
            color="tab:orange",
            label="held-out tasks",
        )
        for step, reward in points:
            axes.annotate(
                f"{reward:.2f}", (step, reward), textcoords="offset points", xytext=(0, 8), ha="center"
            )
    axes.set(xlabel="optimizer step of the trainer", ylabel="mean reward", ylim=(0, 1.08), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
