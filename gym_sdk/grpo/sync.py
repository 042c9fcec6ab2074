"""How new weights reach the engine."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio.to_thread
from safetensors.torch import save_file
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.checkpoints.folders import new_folder, save_model
from gym_sdk.grpo.models import served_model
from gym_sdk.schema.weights import AdapterWeights
from gym_sdk.transport.base import AnyWeights

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["FolderSync", "LoRASync", "TensorSync", "WeightSync", "WeightTarget"]


class WeightTarget(Protocol):
    """What takes new weights: `GymClient`, `backends.policy.Policy`, or anything with this method."""

    async def update_weights(self, source: AnyWeights, *, version: str) -> None:
        """Serve these weights from now on; a sync sends sources of one kind.

        Returns when the new weights serve. Tensors are the trainer's own and must be copied before.
        """
        ...


class WeightSync(Protocol):
    """What `GRPOTrainer` calls after each update of the weights."""

    async def push(self, model: PreTrainedModel | PeftModel, *, version: str) -> None:
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
        self._target = target
        self._folders = _Folders(folder, keep)

    async def push(self, model: PreTrainedModel | PeftModel, *, version: str) -> None:
        """Save, send, and remove versions that are too old; of a peft model, the merged weights.

        Raises:
            ConfigurationError: the version cannot name a folder, or the adapter cannot be merged.
        """
        path = self._folders.path(version)
        await anyio.to_thread.run_sync(_save, model, path)
        self._folders.made(path)
        await self._target.update_weights(path, version=version)
        await self._folders.clear()


class TensorSync:
    """Hands the model's own tensors to an engine in this process, or sends them to a server over HTTP.

    Args:
        target: takes the tensors by their names in `model.state_dict()`.
    """

    def __init__(self, target: WeightTarget) -> None:
        self._target = target

    async def push(self, model: PreTrainedModel | PeftModel, *, version: str) -> None:
        """Send the tensors; the trainer does not touch them until the target has returned.

        Of a peft model, the merged weights are sent.

        Raises:
            ConfigurationError: the adapter cannot be merged.
        """
        served = await anyio.to_thread.run_sync(served_model, model)
        await self._target.update_weights(served.state_dict(), version=version)


class LoRASync:
    """Sends the adapter of a peft model alone, to SGLang started with `--enable-lora`.

    Each push writes `folder/version` in peft's layout (it appears complete or not at all) and passes its
    absolute path on. Generation goes on meanwhile: requests in flight finish on the adapter with which they
    began. SGLang must serve the base model that the adapter is trained on.

    Args:
        target: takes the adapter.
        folder: where the versions go; trainer and engine both reach it.
        adapter: which of the model's adapters.
        keep: how many of the folders pushed by this object stay; at least 1.

    Raises:
        ConfigurationError: `keep` is less than 1.
    """

    def __init__(
        self, target: WeightTarget, folder: str | Path, *, adapter: str = "default", keep: int = 2
    ) -> None:
        self._target = target
        self._folders = _Folders(folder, keep)
        self._adapter = adapter

    async def push(self, model: PreTrainedModel | PeftModel, *, version: str) -> None:
        """Save, send, and remove versions that are too old.

        Raises:
            ConfigurationError: the version cannot name a folder, or the model has no such adapter.
        """
        path = self._folders.path(version)
        await anyio.to_thread.run_sync(_save_adapter, model, self._adapter, path)
        self._folders.made(path)
        await self._target.update_weights(AdapterWeights(path), version=version)
        await self._folders.clear()


class _Folders:
    """The versions that one sync has written."""

    def __init__(self, folder: str | Path, keep: int) -> None:
        if keep < 1:
            raise ConfigurationError(
                f"keep must be at least 1, not {keep}: the engine may still read the newest"
            )
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._made: list[Path] = []

    def path(self, version: str) -> Path:
        """Return where a version goes.

        Raises:
            ConfigurationError: it cannot name a folder.
        """
        path = self._folder / version
        if path.parent != self._folder or version in ("", ".", ".."):
            raise ConfigurationError(f"weight version {version!r} cannot name a folder")
        return path

    def made(self, path: Path) -> None:
        """Note the newest version."""
        self._made = [*(old for old in self._made if old != path), path]

    async def clear(self) -> None:
        """Remove the versions that are too old."""
        while len(self._made) > self._keep:
            old = self._made.pop(0)
            await anyio.to_thread.run_sync(lambda folder: shutil.rmtree(folder, ignore_errors=True), old)


def _save_adapter(model: PreTrainedModel | PeftModel, adapter: str, path: Path) -> None:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ConfigurationError(
            f'adapters need more packages: pip install "gym-sdk[lora]" ({error})'
        ) from error
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        raise ConfigurationError(f"the model has no adapter {adapter!r}; make one with peft.get_peft_model")
    # not peft's own save: it writes a model card, and may ask the hub about the base model
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    with new_folder(path) as folder:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config.save_pretrained(str(folder))


def _save(model: PreTrainedModel | PeftModel, path: Path) -> None:
    with new_folder(path) as folder:
        save_model(served_model(model), folder)
