"""A progress bar over rollouts, in terminals and notebooks."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Self

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Outcome, Rollout

__all__ = ["Progress"]


class Progress:
    """Counts finished rollouts and shows their mean reward.

    Args:
        total: how many rollouts there will be, if that is known.
        label: what stands before the bar.

    Raises:
        ConfigurationError: tqdm is not installed.
    """

    def __init__(self, total: int | None, label: str = "rollouts") -> None:
        try:
            with warnings.catch_warnings():
                # without ipywidgets, a notebook gets the bar as text, and no warning about it
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm
        except ImportError as error:
            raise ConfigurationError('progress=True needs tqdm: pip install "gym-sdk[notebook]"') from error
        self._bar: Any = tqdm(total=total, desc=label, unit="", dynamic_ncols=True, leave=True)
        self._rewards = 0
        self._reward_sum = 0.0
        self._failed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def add(self, rollout: Rollout) -> None:
        """Count one finished rollout."""
        self._failed += rollout.outcome is Outcome.FAILED
        if rollout.reward is not None:
            self._rewards += 1
            self._reward_sum += rollout.reward
        shown = {"reward": f"{self._reward_sum / self._rewards:.3f}"} if self._rewards else {}
        if self._failed:
            shown["failed"] = str(self._failed)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
