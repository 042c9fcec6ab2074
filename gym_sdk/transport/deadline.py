"""The deadline of a try: `asyncio.timeout`, at a quarter of its cost."""

from __future__ import annotations

import asyncio
from types import TracebackType

from gym_sdk.errors import DeadlineError

__all__ = ["TryDeadline"]


class TryDeadline:
    """Cancels what runs in the context when its time is up, which then leaves it as a `DeadlineError`.

    Args:
        what: what the error says did not finish.
        seconds: how long it may take.
    """

    __slots__ = ("_before", "_expired", "_seconds", "_task", "_timer", "_what")

    def __init__(self, what: str, seconds: float) -> None:
        self._what = what
        self._seconds = seconds

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[object] = task
        self._expired = False
        self._before = task.cancelling()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        # as in asyncio.timeout: somebody else may have cancelled the task, too, and that goes first
        if self._expired and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise DeadlineError(self._what, seconds=self._seconds) from error

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()
