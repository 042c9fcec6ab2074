"""Names, types and shapes of weights, and whether they are those of the model that is served."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from gym_sdk.errors import CheckpointError
from gym_sdk.schema.weights import TensorSpec

__all__ = [
    "OUTPUT",
    "Signature",
    "check_folder",
    "check_specs",
    "file_head",
    "file_specs",
    "read_json",
    "signature_of",
]

Signature: TypeAlias = Mapping[str, TensorSpec]
"""The tensors by name, without an output layer that is the embedding."""

OUTPUT = "lm_head.weight"
"""The output layer's name."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEADER_MOST = 100_000_000
"""The format's own limit of a header, in bytes."""
_SHOWN = 5
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PLAIN = frozenset({"float64", "float32", "bfloat16", "float16"})
"""SGLang converts these into each other when it loads them."""


def signature_of(folder: Path) -> Signature:
    """Read the names, types and shapes of a folder's tensors from the headers of its safetensors.

    Raises:
        CheckpointError: there are no safetensors, or a file is cut short or no such file.
    """
    specs: dict[str, TensorSpec] = {}
    for name in _files(folder):
        specs |= {spec.name: spec for spec in file_specs(folder / name)}
    if _tied(folder):
        specs.pop(OUTPUT, None)
    return specs


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
    tied = _tied(folder) or OUTPUT not in expected
    expected = {name: spec for name, spec in expected.items() if not (tied and name == OUTPUT)}
    check_specs((spec for spec in found.values() if not (tied and spec.name == OUTPUT)), expected, folder)


def check_specs(specs: Iterable[TensorSpec], expected: Signature, where: str | Path) -> None:
    """See that tensors are the complete set of the model's.

    A tensor of a wrong shape would end the SGLang process if it came by another way than a folder.

    Args:
        specs: what there is.
        expected: what there must be.
        where: named in the error.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another type or shape.
    """
    found = {spec.name: spec for spec in specs}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"unknown name {name}" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        spec, wanted = found[name], expected[name]
        if spec.shape != wanted.shape:
            problems.append(f"{name} has shape {list(spec.shape)}, the model's has {list(wanted.shape)}")
        if spec.dtype != wanted.dtype and not {spec.dtype, wanted.dtype} <= _PLAIN:
            problems.append(f"{name} is of type {spec.dtype}, the model's is {wanted.dtype}")
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"does not fit the model: {'; '.join(problems[:_SHOWN])}{more}", path=where)


def file_specs(file: Path) -> list[TensorSpec]:
    """Read one header: its length as 8 bytes, little end first, then JSON; the tensors' bytes follow.

    Raises:
        CheckpointError: the file is cut short or no safetensors.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: Any = json.loads(stream.read(length)) if length <= _HEADER_MOST else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        specs = [
            TensorSpec(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in tensors.items()
        ]
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {error}", path=file) from error
    if size != 8 + length + end:
        raise CheckpointError(f"has {size} bytes, not {8 + length + end}: it is not whole", path=file)
    return specs


def file_head(specs: Iterable[TensorSpec]) -> bytes:
    """Return what stands before the values of a file with these tensors, in this order."""
    header: dict[str, Any] = {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin where any of their types may lie
    return struct.pack("<Q", len(text)) + text


def read_json(file: Path) -> Any:
    """Read a file of JSON.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", path=file) from error


def _files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(f"there is neither {_SINGLE} nor {_INDEX}", path=folder)
    index = read_json(folder / _INDEX)
    try:
        return sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{_INDEX} has no weight_map", path=folder) from error


def _tied(folder: Path) -> bool:
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else None
    return isinstance(config, dict) and bool(config.get("tie_word_embeddings"))
