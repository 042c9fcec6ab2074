"""Whether two configurations are of the same model, and if not, what differs first."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from gym_sdk.errors import CheckpointError

__all__ = ["as_json", "check_config", "check_same", "check_shapes", "short"]

# Settings that do not change what a model computes.
_HARMLESS = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they are after a round trip through JSON; sets become sorted lists."""
    result: dict[str, Any] = json.loads(json.dumps(settings, default=_plain, sort_keys=True))
    return result


def check_config(path: Path, saved: dict[str, Any], config: PreTrainedConfig) -> None:
    """Check that a saved `config.json` is of the model that has this configuration.

    Raises:
        CheckpointError: it cannot be read, or is of another model; the message names the first setting.
    """
    try:  # reading it fills in what this version of transformers added since
        full = type(config).from_dict(saved).to_dict() | {"model_type": saved["model_type"]}
    except Exception as error:  # from_dict raises what its validators raise
        raise CheckpointError(f"its configuration cannot be read: {short(error)}", path=path) from error
    check_same(path, "model", full, config.to_dict(), ignored=_HARMLESS, first="model_type")


def check_same(
    path: Path,
    what: str,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    ignored: Collection[str],
    first: str,
) -> None:
    """Check that two mappings of settings say the same.

    Args:
        path: the checkpoint, for the message.
        what: whose settings they are.
        saved: those of the checkpoint.
        current: those of the model to be trained.
        ignored: names that may differ; private ones may too.
        first: the name that is looked at first, because it explains the others.

    Raises:
        CheckpointError: they differ; the message names the first setting that does.
    """
    saved, current = as_json(saved), as_json(current)
    for name in sorted({*saved, *current} - set(ignored), key=lambda name: (name != first, name)):
        if not name.startswith("_") and saved.get(name) != current.get(name):
            raise CheckpointError(
                f"it is of another {what}: {name} is {saved.get(name)!r} in the checkpoint and "
                f"{current.get(name)!r} in the model to be trained. Resume with the {what} that wrote it",
                path=path,
            )


def check_shapes(path: Path, saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint has every tensor of the model, in its shape.

    Raises:
        CheckpointError: it has not; the message names the first parameter.
    """
    for name, tensor in current.items():
        if name not in saved or saved[name].shape != tensor.shape:
            found = list(saved[name].shape) if name in saved else "absent"
            raise CheckpointError(
                f"it is of another model: parameter {name} is {found} in the checkpoint and "
                f"{list(tensor.shape)} in the model to be trained",
                path=path,
            )


def short(error: BaseException) -> str:
    """Return an error's class and first line; transformers' messages run to pages."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
