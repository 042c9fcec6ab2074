"""The body of a request with tensors inside: pickled as SGLang reads them, in base64, in JSON."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["tensors_body"]

_PIECE_BYTES = 3 * 2**18
"""A multiple of 3, of which base64 makes 4; small, as encoding holds the interpreter's lock."""


def tensors_body(
    named: Sequence[tuple[str, torch.Tensor]], processes: int, ending: Mapping[str, Any]
) -> list[bytes]:
    """Return the body's text, in pieces.

    Args:
        named: the tensors.
        processes: how many tensor-parallel processes SGLang has; each reads an entry of its own.
        ending: what else the body says.

    Raises:
        ConfigurationError: some of them lie on a GPU, and some do not.
    """
    entries = _entries([(name, tensor.detach()) for name, tensor in named], processes)
    pieces = [b'{"serialized_named_tensors":["', *entries[0]]
    for entry in entries[1:]:
        pieces += [b'","', *entry]
    return [*pieces, b'"],' + to_json(ending).removeprefix(b"{")]


def _entries(named: list[tuple[str, torch.Tensor]], count: int) -> list[list[bytes]]:
    if any(tensor.is_cuda for _, tensor in named):
        if not all(tensor.is_cuda for _, tensor in named):
            raise ConfigurationError("tensors on a GPU and in CPU memory cannot be sent together")
        import torch.multiprocessing  # noqa: F401  (has the pickler write handles instead of values)

        # a handle may be opened once, so each process gets its own
        return [_encoded(ForkingPickler, named) for _ in range(count)]
    # a view would be pickled with all of the storage that it is a view of
    return [_encoded(pickle.Pickler, [(name, _owned(tensor)) for name, tensor in named])] * count


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _encoded(pickler: type[pickle.Pickler], named: list[tuple[str, torch.Tensor]]) -> list[bytes]:
    text = _Base64()
    pickler(text).dump(named)
    return text.ended()


class _Base64:
    """A file that keeps what is written to it as base64, in pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._rest = bytearray()

    def write(self, data: bytes | memoryview) -> int:
        """Take the next bytes; those that fill no piece wait for more."""
        view = memoryview(data)
        start = 0
        if self._rest:
            start = min(len(view), _PIECE_BYTES - len(self._rest))
            self._rest += view[:start]
            if len(self._rest) < _PIECE_BYTES:
                return len(view)
            self._take(self._rest)
            self._rest = bytearray()
        while len(view) - start >= _PIECE_BYTES:
            self._take(view[start : start + _PIECE_BYTES])
            start += _PIECE_BYTES
        self._rest += view[start:]
        return len(view)

    def ended(self) -> list[bytes]:
        """Return all pieces."""
        self._take(self._rest)
        return self._pieces

    def _take(self, data: bytearray | memoryview) -> None:
        self._pieces.append(base64.b64encode(data))
