"""What lets SGLang run in this environment without a GPU; `gym_sdk_sglang_cpu.pth` imports it at every start.

At import, PyPI's torchvision (a CUDA build) registers variants of operators that its compiled library has.
It cannot be loaded here, so their schemas are defined first; text models call neither.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    # several threads collapse where the cores are shared
    "OMP_NUM_THREADS": "1",
}
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[object] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the schemas when torchvision is first asked for, so that nobody else has to import torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing; torchvision is where it always is."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)
            _kept.append(library)  # the schemas go when it does
        return None


for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
sys.meta_path.insert(0, _BeforeTorchvision())
