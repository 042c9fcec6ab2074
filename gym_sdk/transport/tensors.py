"""Tensors as a stream of bytes in the safetensors format, without a copy of the whole."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["TensorStream", "without_ties"]

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_PIECE_BYTES = 4 * 2**20
_OUTPUT = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorStream:
    """A body of a request, which can be sent once.

    Attributes:
        nbytes: its length.
        head: the format's header.
        tensors: whose values follow, in this order; they must not change meanwhile.
    """

    nbytes: int
    head: bytes
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> TensorStream:
        """Lay out tensors; of those that share their memory, one is sent.

        Raises:
            ConfigurationError: there is none, or one of a type that the format does not know.
        """
        chosen = without_ties(tensors)
        if not chosen:
            raise ConfigurationError("there are no tensors to send")
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in chosen.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _CODES:
                raise ConfigurationError(f"{name}: tensors of type {dtype} cannot be sent")
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _CODES[dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the values begin where any of their types may lie
        head = struct.pack("<Q", len(text)) + text
        return cls(len(head) + end, head, tuple(chosen.values()))

    async def pieces(self) -> AsyncIterator[bytes | memoryview]:
        """Yield the body."""
        yield self.head
        for tensor in self.tensors:
            values = await anyio.to_thread.run_sync(_bytes, tensor)
            for start in range(0, len(values), _PIECE_BYTES):
                yield values[start : start + _PIECE_BYTES]


def without_ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, those that are the same memory once; an output layer gives way to the embedding."""
    found: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = place if tensor.numel() else (name,)
        if key not in found or found[key] == _OUTPUT:
            found[key] = name
    kept = set(found.values())
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's values in order, copied only where they do not lie so in CPU memory."""
    import torch

    values = tensor.detach().cpu().reshape(-1).view(torch.uint8)
    return memoryview(values.numpy().data).cast("B")
