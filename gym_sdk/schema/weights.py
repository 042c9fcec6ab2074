"""What a trainer and an engine tell each other about new weights. The weights themselves go another way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gym_sdk.errors import ConfigurationError

__all__ = [
    "BUCKET_BYTES",
    "WEIGHTS_GROUP_UNKNOWN",
    "AdapterWeights",
    "BroadcastWeights",
    "TensorSpec",
    "WeightsGroup",
    "in_buckets",
]

WEIGHTS_GROUP_UNKNOWN = "weights_group_unknown"
"""`PolicyError.code` of an engine that is not, or no longer, in the named group; nothing has happened."""

BUCKET_BYTES = 512 * 2**20
"""How much of the weights is on its way at a time, unless somebody says otherwise."""

_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor without its values.

    Attributes:
        name: as in the model's `state_dict`.
        dtype: torch's name of the number type, e.g. `bfloat16`.
        shape: its sizes.

    Raises:
        ConfigurationError: the number type is unknown, or a size negative.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ConfigurationError(f"{self.name}: weights cannot be of type {self.dtype!r}")
        if any(size < 0 for size in self.shape):
            raise ConfigurationError(f"{self.name}: {list(self.shape)} is no shape")

    @property
    def nbytes(self) -> int:
        """How many bytes its values take."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightsGroup:
    """A torch.distributed process group in which rank 0, the trainer, sends weights to the other ranks.

    Attributes:
        name: names it in later calls.
        address: where rank 0 keeps the group's store, as the engine reaches it.
        port: the store's port.
        backend: `nccl` between GPUs, `gloo` between CPUs.
        first_rank: the rank of the engine's first process; its others follow.
        world_size: how many ranks there are, the trainer's included.

    Raises:
        ConfigurationError: a value is out of range.
    """

    name: str
    address: str
    port: int
    backend: str
    first_rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not self.name or not self.address:
            raise ConfigurationError("a weights group needs a name and an address")
        if not 0 < self.port < 2**16:
            raise ConfigurationError(f"a weights group's port must be from 1 to 65535, not {self.port}")
        if not 0 < self.first_rank < self.world_size:
            raise ConfigurationError(
                f"first_rank must be from 1 to before world_size ({self.world_size}), not {self.first_rank}"
            )


@dataclass(frozen=True, slots=True)
class BroadcastWeights:
    """A complete set of weights that rank 0 of a group sends, tensor by tensor in this order.

    Attributes:
        group: the group's name.
        tensors: what is sent, tied tensors once.
        bucket_bytes: how the tensors are divided into parts (`in_buckets`); both sides must agree on it.

    Raises:
        ConfigurationError: `bucket_bytes` is not positive, or a name is there twice.
    """

    group: str
    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ConfigurationError(f"bucket_bytes must be positive, not {self.bucket_bytes}")
        if len({spec.name for spec in self.tensors}) < len(self.tensors):
            raise ConfigurationError("the broadcast names a tensor twice")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A LoRA adapter in a folder in peft's layout, on top of the base weights that the engine has."""

    path: Path


def in_buckets(specs: Iterable[TensorSpec], bucket_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Divide tensors into parts of at most so many bytes, in their order.

    A tensor that is larger than that is a part of its own. Sender and receiver of a broadcast both call this,
    so its result depends on nothing else.
    """
    parts: list[tuple[TensorSpec, ...]] = []
    part: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if part and size + spec.nbytes > bucket_bytes:
            parts.append(tuple(part))
            part, size = [], 0
        part.append(spec)
        size += spec.nbytes
    if part:
        parts.append(tuple(part))
    return parts
