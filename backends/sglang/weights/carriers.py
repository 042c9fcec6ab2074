"""The ways of full weights into SGLang: each checks everything first, then sends it.

What SGLang's routes do with the cache (seen in 0.5.23): every one of them takes `flush_cache`, and refuses
to have succeeded if requests still hold on to it. The label `weight_version` and the flush go with the last
part, so that neither happens to a part of the weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from backends.engine import BroadcastWeights, TensorWeights
from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.weights.pickled import tensors_body
from backends.sglang.weights.shared import may_share, shared_folder, shared_load
from backends.sglang.weights.signature import OUTPUT, check_folder, check_specs
from gym_sdk.errors import CheckpointError, GymError, PolicyError
from gym_sdk.schema.weights import WEIGHTS_GROUP_UNKNOWN, TensorSpec, in_buckets

if TYPE_CHECKING:
    import torch

__all__ = ["BroadcastCarrier", "Carrier", "FolderCarrier", "TensorCarrier"]

_NO_GROUP = "call `init_weights_update_group` first"
_OPEN_ALREADY = "session is already open"


class Carrier(Protocol):
    """One complete set of weights on its way.

    Attributes:
        name: what it is, for errors.
        folder: where SGLang could read it again; None where it could not.
        touched: whether SGLang's weights may have changed.
    """

    name: str
    folder: Path | None
    touched: bool

    async def check(self) -> None:
        """See that these are the model's weights.

        Raises:
            CheckpointError: they are not.
            ConfigurationError: SGLang cannot take them in this way.
        """
        ...

    async def send(self, version: str) -> None:
        """Replace the weights of an SGLang that is paused.

        Raises:
            GymError: it did not happen, or only in part.
        """
        ...


class FolderCarrier:
    """A folder that SGLang reads itself."""

    def __init__(self, client: SGLangClient, facts: Facts, folder: Path) -> None:
        self.name = str(folder)
        self.folder: Path | None = folder
        self.touched = False
        self._client = client
        self._signature = facts.signature
        self._path = folder

    async def check(self) -> None:
        """Read the headers of its files."""
        await asyncio.to_thread(check_folder, self._path, self._signature)

    async def send(self, version: str) -> None:
        """Tell SGLang to load it, under its own path: SGLang also takes the path for the model's name."""
        self.touched = True
        body = {
            "model_path": str(self._path),
            "weight_version": version,
            "abort_all_requests": False,
            "flush_cache": True,
        }
        within_s = self._client.config.update_s
        await self._client.post("/update_weights_from_disk", body, within_s=within_s)


class TensorCarrier:
    """Tensors of this process.

    Tensors in CPU memory reach an SGLang on this machine as a file in shared memory. Where that cannot be,
    they go inside the requests, a bucket at a time: pickled as SGLang reads them, in base64, some two and a
    half times a bucket's bytes in memory. Tensors on a GPU stay there, and the requests carry their CUDA IPC
    handles, which SGLang must be able to open: it runs on the same machine and sees the same GPU. The latter
    follows SGLang's source, and has never been run by our tests, which have no GPU.

    Args:
        client: the way to SGLang.
        facts: what it is.
        source: the tensors; tied ones may be there twice.
    """

    def __init__(self, client: SGLangClient, facts: Facts, source: TensorWeights) -> None:
        self.name = "tensors"
        self.folder: Path | None = None
        self.touched = False
        self._client = client
        self._facts = facts
        self._tensors = dict(source.tensors)
        self._specs: list[TensorSpec] = []

    async def check(self) -> None:
        """Compare names, types and shapes with those of the model; leave out the second of tied tensors."""
        self._facts.check_alone("tensors")
        signature = self._facts.signature
        await asyncio.to_thread(
            _drop_tied, self._tensors, untied=signature is not None and OUTPUT in signature
        )
        self._specs = [_spec(name, tensor) for name, tensor in self._tensors.items()]
        if not self._specs:
            raise CheckpointError("there is no tensor among them", path=self.name)
        if signature is not None:
            check_specs(self._specs, signature, self.name)

    async def send(self, version: str) -> None:
        """Send the tensors; nobody may write to them until this returns."""
        if may_share(self._client, self._facts, self._tensors) and await self._shared(version):
            return
        buckets = in_buckets(self._specs, self._client.config.bucket_bytes)
        async with _session(self._client):
            for bucket in buckets:
                named = [(spec.name, self._tensors[spec.name]) for spec in bucket]
                ending = _ending(version, bucket is buckets[-1])
                body = await asyncio.to_thread(tensors_body, named, self._facts.tp_size, ending)
                self.touched = True
                within_s = self._client.config.update_s
                await self._client.post_pieces("/update_weights_from_tensor", body, within_s=within_s)

    async def _shared(self, version: str) -> bool:
        """Send them by shared memory; return False if there is no such way, with nothing touched."""
        async with shared_folder(self._client, self._specs, self._tensors) as folder:
            if folder is None:
                return False
            self.touched = True  # as long as nobody says otherwise
            self.touched = await shared_load(self._client, folder, version)
            return self.touched


class BroadcastCarrier:
    """Tensors that rank 0 of a process group sends, while SGLang is told bucket by bucket what to expect."""

    def __init__(self, client: SGLangClient, facts: Facts, source: BroadcastWeights) -> None:
        self.name = f"the broadcast in {source.group!r}"
        self.folder: Path | None = None
        self.touched = False
        self._client = client
        self._facts = facts
        self._source = source

    async def check(self) -> None:
        """Compare names, types and shapes with those of the model."""
        self._facts.check_alone("broadcasts")
        if not self._source.tensors:
            raise CheckpointError("there is no tensor in it", path=self.name)
        if self._facts.signature is not None:
            check_specs(self._source.tensors, self._facts.signature, self.name)

    async def send(self, version: str) -> None:
        """Have SGLang receive everything."""
        buckets = in_buckets(self._source.tensors, self._source.bucket_bytes)
        async with _session(self._client):
            for bucket in buckets:
                body = {
                    "names": [spec.name for spec in bucket],
                    "dtypes": [spec.dtype for spec in bucket],
                    "shapes": [list(spec.shape) for spec in bucket],
                    "group_name": self._source.group,
                    **_ending(version, bucket is buckets[-1]),
                }
                await self._receive(body)

    async def _receive(self, body: dict[str, Any]) -> None:
        first, self.touched = not self.touched, True
        try:
            within_s = self._client.config.update_s
            await self._client.post("/update_weights_from_distributed", body, within_s=within_s)
        except PolicyError as error:
            if first and _NO_GROUP in str(error):  # SGLang was started again: it has received nothing
                self.touched = False
                raise unknown_group(self._source.group) from error
            raise


def unknown_group(name: str) -> PolicyError:
    """Return the error for a group that this engine is not in."""
    return PolicyError(
        f"the weights group {name!r} is not known here (any more); join a new one",
        status=404,
        code=WEIGHTS_GROUP_UNKNOWN,
        param="group_name",
    )


def _ending(version: str, last: bool) -> dict[str, Any]:
    return {
        "flush_cache": last,
        "abort_all_requests": False,
        **({"weight_version": version} if last else {}),
    }


@asynccontextmanager
async def _session(client: SGLangClient) -> AsyncIterator[None]:
    """Open SGLang's session for an update, and close it whatever comes."""
    try:
        await client.post("/begin_weight_update", {})
    except PolicyError as error:
        if _OPEN_ALREADY not in str(error):
            raise
        # somebody went away in the middle of an update; this one replaces everything
        await client.post("/end_weight_update", {})
        await client.post("/begin_weight_update", {})
    try:
        yield
    except BaseException:
        with anyio.CancelScope(shield=True), suppress(GymError):
            await client.post("/end_weight_update", {})
        raise
    await client.post("/end_weight_update", {})


def _drop_tied(tensors: dict[str, torch.Tensor], *, untied: bool) -> None:
    """Leave out an output layer that is the embedding."""
    output = None if untied else tensors.get(OUTPUT)
    if output is None:
        return
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        return  # the check of the names says what is wrong
    other = tensors[embedding]
    if output.data_ptr() != other.data_ptr() and not _same(output, other):
        raise CheckpointError(
            f"{OUTPUT} and {embedding} are tied in the model and differ here", path="tensors"
        )
    del tensors[OUTPUT]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
