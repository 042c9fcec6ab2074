"""Torch's threads on machines that are shared."""

from __future__ import annotations

import os
import sys

__all__ = ["spin_briefly"]

_SPIN_COUNT = "1000"  # some microseconds: as fast as long spinning on idle cores, and harmless on busy ones


def spin_briefly() -> None:
    """Let OpenMP threads sleep soon where they wait, unless the user has said how they should wait.

    By default libgomp, which torch uses on Linux, lets them spin for long. On a core that something else
    uses too, the spinning thread keeps the one that it waits for from running: a small model then trains many
    times slower. The setting counts if it is made before torch is loaded, so nothing happens after that;
    child processes inherit it.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
