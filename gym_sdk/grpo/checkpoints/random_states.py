"""The process's generators of random numbers: Python's, numpy's, torch's on the CPU and on GPUs."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_states", "set_random_states"]

_log = logging.getLogger(__name__)


def random_states() -> dict[str, Any]:
    """Return the states as tensors, numbers and text, which `torch.load(weights_only=True)` reads."""
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = numpy
    return {
        "python": random.getstate(),
        "numpy": (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the states back. Those of GPUs only if there are as many as there were; else it logs a warning."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) == devices:
        torch.cuda.set_rng_state_all(states["cuda"])
    else:
        _log.warning(
            "the checkpoint has the random states of %d GPUs and this process has %d: what is sampled on "
            "them will differ from the run that wrote it",
            len(states["cuda"]),
            devices,
        )
