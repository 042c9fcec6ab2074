"""Let PyPI's torchvision, a CUDA build, be imported beside a torch without CUDA.

At import it registers variants of operators that its compiled library would have defined. That library cannot
be loaded here, so the two schemas are defined first; SGLang's text models call neither. Python runs this file
at the start of every process that has its folder on the path, SGLang's child processes included.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the schemas when torchvision is first asked for, so that no other process imports torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)
            _KEPT.append(library)  # its schemas go when it does
        return None


_KEPT: list[object] = []
sys.meta_path.insert(0, _BeforeTorchvision())
