"""Where a program spends its time, from a profile."""

from __future__ import annotations

import cProfile
import pstats
from collections import defaultdict
from pathlib import Path
from typing import Any

TOP = 20

Place = tuple[str, int, str]
"""A function, as the profiler names it: file, line, name. What is written in C has line 0."""


def shares(profile: cProfile.Profile) -> dict[str, dict[str, float]]:
    """Return the shares of the time that functions and modules spend themselves, the largest first.

    What is written in C counts for the module that called it; other packages count as wholes.
    """
    functions: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    entries: dict[Place, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for place, (_, _, own_s, _, callers) in entries.items():
        path, line, name = place
        functions[f"{_module(path)}:{line} {name}" if line else name] += own_s
        if line or not callers:
            modules[_package(path)] += own_s
        else:
            for caller, (_, _, called_s, _) in callers.items():
                modules[_package(caller[0])] += called_s
    return {"functions": _largest(functions), "modules": _largest(modules)}


def _largest(seconds: dict[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    chosen = sorted(seconds, key=lambda name: -seconds[name])[:TOP]
    return {name: seconds[name] / whole for name in chosen}


def _package(path: str) -> str:
    module = _module(path)
    return module if module.startswith("gym_sdk.") else module.split(".", 1)[0]


def _module(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    if "gym_sdk" in parts:
        return ".".join(parts[len(parts) - 1 - parts[::-1].index("gym_sdk") :])
    for root in ("site-packages", Path(pstats.__file__).parent.name):
        if root in parts:
            return ".".join(parts[len(parts) - parts[::-1].index(root) :])
    return parts[-1] if parts else path
