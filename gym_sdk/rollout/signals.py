"""Ending properly when the operating system asks for it."""

from __future__ import annotations

import asyncio
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from gym_sdk.errors import ConfigurationError

__all__ = ["SignalStop", "stop_on_signals"]


def stop_on_signals(*signals: signal.Signals) -> SignalStop:
    """Return a context whose body is cancelled when one of these signals comes.

    Streams in it are then left as by a `break`: what is in flight is aborted on the server, the store is
    closed, partial rollouts are kept where that is asked for. The context swallows that cancellation:

        async with stop_on_signals() as stop:
            await collect()
        if stop.signal is not None:
            sys.exit(stop.exit_status)

    From the first signal on, the handlers are those of before: a second one ends the process as it always
    does.

    Args:
        *signals: which; SIGINT and SIGTERM by default.
    """
    return SignalStop(signals or (signal.SIGINT, signal.SIGTERM))


class SignalStop:
    """Made by `stop_on_signals`; an asynchronous context manager.

    Attributes:
        signal: the one that came, if one did.

    Raises:
        ConfigurationError: on entering: this is not the main thread, the only one that gets signals.
    """

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.signal: signal.Signals | None = None
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self._loop: asyncio.AbstractEventLoop
        self._task: asyncio.Task[Any]
        self._cancelling = 0

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that a signal ended; 0 if none did."""
        return 0 if self.signal is None else 128 + self.signal

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._loop, self._task, self._cancelling = asyncio.get_running_loop(), task, task.cancelling()
        try:
            for number in self._signals:
                self._before[number] = signal.signal(number, self._handle)
        except ValueError as error:
            raise ConfigurationError("signals come to the main thread only") from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._restore()
        if self.signal is None:
            return False
        if kind is not asyncio.CancelledError:  # the body ended by itself: take what is on its way
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                kind = kind or asyncio.CancelledError
        is_ours = self._task.uncancel() <= self._cancelling
        return is_ours and kind is asyncio.CancelledError

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Run between any two instructions of the main thread: leave the work to the event loop."""
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._restore()
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
