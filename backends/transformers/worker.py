"""The step thread: runs the scheduler while there is work, and what it is asked to do between two steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

import torch

from backends.transformers.request import Output
from backends.transformers.scheduler import Scheduler
from gym_sdk.errors import GymError

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Command: TypeAlias = tuple[Callable[[], Any], "Future[Any] | None"]


class Worker:
    """Owns a scheduler and the thread that steps it.

    PyTorch releases the interpreter lock inside its operators, so an event loop in another thread stays
    responsive. Everything that touches the scheduler goes through `call` or `post` and happens between two
    steps, in the order given.

    Args:
        scheduler: what to run.
        deliver: hands the outputs of one step to the callers; called from the step thread.
        broken: called once from the step thread with the exception that ended it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        deliver: Callable[[list[Output]], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self.scheduler = scheduler
        self.paused = False
        self.error: BaseException | None = None
        self._deliver = deliver
        self._broken = broken
        self._commands: deque[_Command] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._closing = False
        self._thread: threading.Thread | None = None

    def post(self, command: Callable[[], list[Output] | None]) -> None:
        """Run a command between two steps, and deliver the outputs that it returns."""
        self._enqueue(lambda: self._deliver(command() or []), None)

    def call(self, command: Callable[[], _T]) -> Future[_T]:
        """Run a command between two steps; the future has its result or its exception."""
        future: Future[_T] = Future()
        self._enqueue(command, future)
        return future

    def close(self) -> None:
        """Abort everything and let the thread end after the step in progress; does not wait."""
        with self._lock:
            self._closing = True
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False if it has not within the timeout."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def _enqueue(self, command: Callable[[], Any], future: Future[Any] | None) -> None:
        with self._lock:
            if self._closing:
                raise self._refusal()
            self._commands.append((command, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gym-sdk-engine", daemon=True)
                self._thread.start()
        self._wake.set()

    def _refusal(self) -> GymError:
        if self.error is None:
            return GymError("the engine is closed")
        refusal = GymError(f"the engine broke: {type(self.error).__name__}: {self.error}")
        refusal.__cause__ = self.error
        return refusal

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
            self._deliver(self.scheduler.abort_all())
        except BaseException as error:
            logger.exception("the step thread broke")
            self.error = error
            with self._lock:
                self._closing = True
            self.scheduler.discard()  # before anybody hears of it: whoever looks then sees no load
            self._broken(error)
        finally:
            self._drop_commands()
            self.scheduler.discard()

    def _loop(self) -> None:
        while True:
            if self.paused or not self.scheduler.has_work:
                self._wake.wait()
            self._wake.clear()
            closing = self._closing  # read first: what was accepted before it was set is still executed
            while self._commands:
                _execute(*self._commands.popleft())
            if closing:
                return
            if self.scheduler.has_work and not self.paused:
                outputs = self.scheduler.step()
                if outputs:
                    self._deliver(outputs)

    def _drop_commands(self) -> None:
        while self._commands:
            _, future = self._commands.popleft()
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(self._refusal())


def _execute(command: Callable[[], Any], future: Future[Any] | None) -> None:
    if future is None:
        command()
        return
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = command()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)
