"""How new weights reach the engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import anyio.to_thread
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.folders import new_folder, save_model

__all__ = ["FolderSync", "TensorSync", "WeightSync", "WeightTarget"]


class WeightTarget(Protocol):
    """What takes new weights: `GymClient`, or anything with this method."""

    async def update_weights(self, source: str | Path | Mapping[str, Tensor], *, version: str) -> None:
        """Serve these weights from now on: a model folder, or tensors by parameter name.

        Returns when the new weights serve. Tensors are the trainer's own and must be copied before.
        """
        ...


class WeightSync(Protocol):
    """What `GRPOTrainer` calls after each update of the weights."""

    async def push(self, model: PreTrainedModel, *, version: str) -> None:
        """Return when the engine serves these weights under this version."""
        ...


class FolderSync:
    """Sends weights as a folder that trainer and engine both reach.

    Each push writes `folder/version` (Hugging Face layout, safetensors; it appears complete or not at all)
    and passes its absolute path on.

    Args:
        target: takes the path.
        folder: where the versions go.
        keep: how many of the folders pushed by this object stay; at least 1.

    Raises:
        ConfigurationError: `keep` is less than 1.
    """

    def __init__(self, target: WeightTarget, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigurationError(
                f"keep must be at least 1, not {keep}: the engine may still read the newest"
            )
        self._target = target
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._pushed: list[Path] = []

    async def push(self, model: PreTrainedModel, *, version: str) -> None:
        """Save, send, and remove versions that are too old.

        Raises:
            ConfigurationError: the version cannot name a folder.
        """
        path = self._folder / version
        if path.parent != self._folder or version in ("", ".", ".."):
            raise ConfigurationError(f"weight version {version!r} cannot name a folder")
        await anyio.to_thread.run_sync(_save, model, path)
        self._pushed = [*(old for old in self._pushed if old != path), path]
        await self._target.update_weights(path, version=version)
        while len(self._pushed) > self._keep:
            old = self._pushed.pop(0)
            await anyio.to_thread.run_sync(lambda folder: shutil.rmtree(folder, ignore_errors=True), old)


class TensorSync:
    """Hands the model's own tensors to an engine in this process, which copies them.

    Args:
        target: takes the tensors by their names in `model.state_dict()`.
    """

    def __init__(self, target: WeightTarget) -> None:
        self._target = target

    async def push(self, model: PreTrainedModel, *, version: str) -> None:
        """Send the tensors; the trainer does not touch them until the target has returned."""
        await self._target.update_weights(model.state_dict(), version=version)


def _save(model: PreTrainedModel, path: Path) -> None:
    with new_folder(path) as folder:
        save_model(model, folder)
