"""Tensors in memory that SGLang shares with this process: written there once, as a file that SGLang maps."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from weakref import WeakSet

import anyio

from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.weights.signature import file_head
from gym_sdk.errors import GymError, PolicyError
from gym_sdk.schema.weights import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["may_share", "shared_folder", "shared_load"]

logger = logging.getLogger(__name__)

_PREFIX = "gym-sdk-weights-"
_FILE = "model.safetensors"
_RESERVE_BYTES = 64 * 2**20
"""What is left to others: shared memory that is full breaks whoever uses it."""
_PIECE_BYTES = 16 * 2**20
_UNREAD = ("Failed to get weights iterator", "Failed to get model loader")
"""SGLang's answers if it finds no file at the path, or is set to load no files; nothing is touched then."""
_blind: WeakSet[SGLangClient] = WeakSet()
"""Those whose SGLang did not find what was laid out for it: it would look for it on the Hub each time."""


def may_share(client: SGLangClient, facts: Facts, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether SGLang may see this machine's memory, and the tensors lie in it."""
    return (
        client.config.shared_memory is not None
        and client not in _blind
        and facts.nodes == 1  # of the others nobody would say that they found nothing
        and _is_loopback(client.url)
        and all(tensor.device.type == "cpu" for tensor in tensors.values())
    )


@asynccontextmanager
async def shared_folder(
    client: SGLangClient, specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]
) -> AsyncIterator[Path | None]:
    """Write tensors into a folder in shared memory, which goes when the context is left.

    Args:
        client: whose settings say where.
        specs: of the tensors, in the order of the file.
        tensors: by name; nobody may write to them meanwhile.

    Yields:
        The folder; None where there is too little room.
    """
    place = client.config.shared_memory
    folder: _Folder | None = None
    try:
        try:
            if place is None or not _has_room(place, sum(spec.nbytes for spec in specs)):
                raise OSError("it is missing or too small")
            folder = _Folder(place)
            await asyncio.to_thread(folder.write, specs, tensors)
        except OSError as error:
            logger.debug("shared memory at %s is not used: %s", place, error)
            yield None
        else:
            yield folder.path
    finally:
        if folder is not None:
            with anyio.CancelScope(shield=True):
                await asyncio.to_thread(folder.remove)


async def shared_load(client: SGLangClient, folder: Path, version: str) -> bool:
    """Have SGLang load the folder; return False if it cannot see it: nothing has been touched then.

    Raises:
        GymError: it refused the weights, or did not answer.
    """
    body = {
        "model_path": str(folder),
        "weight_version": version,
        "abort_all_requests": False,
        "flush_cache": True,
    }
    try:
        await client.post("/update_weights_from_disk", body, within_s=client.config.update_s)
    except PolicyError as error:
        if not any(f": {answer}" in str(error) for answer in _UNREAD):
            raise
        _blind.add(client)
        logger.info("SGLang at %s does not read this process's shared memory: %s", client.url, error)
        return False
    except BaseException:
        # it may be loading still, and would end if the folder went then; it answers this after that
        with anyio.CancelScope(shield=True), suppress(GymError):
            await client.get("/server_info")
        raise
    return True


class _Folder:
    """A folder of this user's alone. It is locked, so that one whose process was killed is told apart."""

    def __init__(self, place: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))  # of mode 0700
        self._gone = False
        self._busy = threading.Lock()
        self._lock = os.open(self.path, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the file, unless the folder is removed meanwhile."""
        with self._busy:
            _remove_orphans(self.path.parent)
            if self._gone:
                return
            with (self.path / _FILE).open("wb", buffering=0) as file:
                file.write(file_head(specs))
                for spec in specs:
                    values = _values(tensors[spec.name])
                    while values and not self._gone:
                        values = values[file.write(values[:_PIECE_BYTES]) :]

    def remove(self) -> None:
        """Have `write` stop, and remove everything."""
        self._gone = True
        with self._busy:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def _remove_orphans(place: Path) -> None:
    """Remove the folders of processes that were killed."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody else's, or gone
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _values(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's values in order, copied only where they do not lie so."""
    import torch

    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def _has_room(place: str, nbytes: int) -> bool:
    return shutil.disk_usage(place).free >= nbytes + _RESERVE_BYTES


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
