"""Names and shapes of a folder's tensors, read from the headers of its safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from gym_sdk.errors import CheckpointError

__all__ = ["Signature", "check_folder", "signature_of"]

Signature: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shape by tensor name, without an output layer that is the embedding."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEADER_MOST = 100_000_000
"""The format's own limit of a header, in bytes."""
_SHOWN = 5


def signature_of(folder: Path) -> Signature:
    """Read the names and shapes of a folder's tensors.

    Raises:
        CheckpointError: there are no safetensors, or a file is cut short or no such file.
    """
    names = _files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= _shapes(folder / name)
    if _tied(folder):
        shapes.pop("lm_head.weight", None)
    return shapes


def check_folder(folder: Path, expected: Signature | None) -> None:
    """See that a folder holds a complete set of weights for the model that is served.

    SGLang itself leaves a parameter that the folder lacks as it was, and after a tensor of a wrong shape it
    reloads the same folder, so neither may reach it.

    Args:
        folder: in the Hugging Face layout.
        expected: of the weights that are served; None checks only that the files are whole.

    Raises:
        CheckpointError: the folder is damaged, or of another model.
    """
    found = signature_of(folder)
    if expected is None:
        return
    if _tied(folder) or "lm_head.weight" not in expected:
        found = {name: shape for name, shape in found.items() if name != "lm_head.weight"}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"unknown name {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(shape)}, the model's has {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"does not fit the model: {'; '.join(problems[:_SHOWN])}{more}", path=folder)


def _files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(f"there is neither {_SINGLE} nor {_INDEX}", path=folder)
    index = _json(folder / _INDEX)
    try:
        return sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{_INDEX} has no weight_map", path=folder) from error


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read one header: its length as 8 bytes, little end first, then JSON; the tensors' bytes follow."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: Any = json.loads(stream.read(length)) if length <= _HEADER_MOST else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {error}", path=file) from error
    if size != 8 + length + end:
        raise CheckpointError(f"has {size} bytes, not {8 + length + end}: it is not whole", path=file)
    return shapes


def _tied(folder: Path) -> bool:
    file = folder / "config.json"
    config = _json(file) if file.is_file() else None
    return isinstance(config, dict) and bool(config.get("tie_word_embeddings"))


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", path=file) from error
