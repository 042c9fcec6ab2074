"""Python's garbage collector, held back while thousands of rollouts are in flight."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["calm_collector"]

_YOUNG = 5_000
"""Objects that are made before the collector looks at the young ones; 700 by default."""
_ROUNDS = (2, 1000)
"""Looks at the young ones before one at those that outlived them, which is to stay short, and of these before
one at everything, which takes as long as there is much."""

_lock = threading.Lock()
_users = 0
_before: tuple[int, int, int] = (0, 0, 0)


@contextmanager
def calm_collector() -> Iterator[None]:
    """Have the collector look less often, for as long as somebody is in here.

    Rollouts in flight live long, and the collector goes through all of them again and again: with
    thousands, that is a third of the CPU, in pauses of seconds. They are freed without it, since they hold no
    cycles. The thresholds are the process's; whoever leaves last puts back what was there before. Settings
    that are calmer already, and a collector that is off, stay as they are.
    """
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = gc.get_threshold()
            if 0 < _before[0] < _YOUNG:
                gc.set_threshold(_YOUNG, *_ROUNDS)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and gc.get_threshold() == (_YOUNG, *_ROUNDS):
                gc.set_threshold(*_before)
