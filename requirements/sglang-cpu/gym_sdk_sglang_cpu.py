"""What lets SGLang run in this environment without a GPU; `gym_sdk_sglang_cpu.pth` imports it at every start.

At import, PyPI's torchvision (a CUDA build) registers variants of operators that its compiled library has.
It cannot be loaded here, so their schemas are defined first; text models call neither.

SGLang's `torch_native` LoRA pins its small index tensors wherever it runs; torch refuses that where there is
nothing to pin for. They get plain memory instead: pinning changes where memory lies, never what is in it.
"""

from __future__ import annotations

import functools
import importlib.abc
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")
"""What torch offers with `pin_memory`, and LoRA may call."""
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


class _BeforeLoRA(importlib.abc.MetaPathFinder):
    """Does without pinned memory once SGLang's LoRA is asked for; a process without it stays as it is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find nothing; SGLang is where it always is."""
        if fullname == "sglang.srt.lora.layers":
            sys.meta_path.remove(self)
            import torch

            if not torch.accelerator.is_available():
                for name in _FACTORIES:
                    setattr(torch, name, _unpinned(getattr(torch, name)))
                torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
        return None


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return made


for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
sys.meta_path[:0] = [_BeforeTorchvision(), _BeforeLoRA()]
