"""Lets SGLang run LoRA without a GPU: on `PYTHONPATH`, it turns requests for pinned memory into plain memory.

SGLang's `torch_native` LoRA pins its small index tensors wherever it runs; torch refuses that where there is
nothing to pin for. Pinning changes where memory lies, never what is in it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")


def _plain(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return made


def _unpin(torch: ModuleType) -> None:
    if torch.accelerator.is_available():
        return
    for name in _FACTORIES:
        setattr(torch, name, _plain(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for SGLang's LoRA: torch is complete by then, and a process without LoRA stays as it is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "sglang.srt.lora.layers":
            sys.meta_path.remove(self)
            import torch

            _unpin(torch)
        return None


sys.meta_path.insert(0, _Finder())
