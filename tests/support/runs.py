"""What two training runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["lines", "same_tensors", "tensors", "untimed"]


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics without those that no two runs have in common."""
    return {
        name: value
        for name, value in metrics.items()
        if not name.rpartition("/")[2].startswith("seconds") and not name.endswith("_per_s")
    }


def lines(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics, untimed."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [untimed(json.loads(line)) for line in text.splitlines()]


def tensors(value: Any) -> list[Tensor]:
    """Return copies of all tensors in dicts and lists, in their order."""
    if isinstance(value, Tensor):
        return [value.clone()]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in entries for tensor in tensors(entry)]


def same_tensors(left: Any, right: Any) -> bool:
    """Whether two states hold the same tensors, bit for bit."""
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    return bool(pairs) and all(torch.equal(one, other) for one, other in pairs)
