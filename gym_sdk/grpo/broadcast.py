"""Weights by broadcast: from the trainer's memory into the engine's, through a torch.distributed group."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError, DeadlineError, GymError, PolicyError
from gym_sdk.grpo.models import served_model
from gym_sdk.grpo.process_group import SendingGroup, Store
from gym_sdk.grpo.sync import WeightTarget
from gym_sdk.schema.weights import (
    BUCKET_BYTES,
    WEIGHTS_GROUP_UNKNOWN,
    BroadcastWeights,
    TensorSpec,
    WeightsGroup,
    in_buckets,
)
from gym_sdk.transport.tensors import without_ties

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["BroadcastSync", "BroadcastTarget"]

logger = logging.getLogger(__name__)

_GRACE_S = 30.0
"""How long the engine may take to say why a broadcast failed, and to leave a group."""
T = TypeVar("T")


class BroadcastTarget(WeightTarget, Protocol):
    """What takes weights by broadcast: `GymClient` or `backends.policy.Policy`, over SGLang."""

    async def weight_ranks(self) -> int:
        """Return how many ranks the engine takes in a group."""
        ...

    async def join_weights_group(self, group: WeightsGroup) -> None:
        """Have the engine join a group; return when all ranks are there."""
        ...

    async def leave_weights_group(self, name: str) -> None:
        """Have the engine leave a group."""
        ...


class BroadcastSync:
    """Sends weights to SGLang by torch.distributed: no file, no copy through HTTP.

    The trainer is rank 0 of a group of its own, beside whatever groups it trains with; the engine's processes
    are the other ranks. The group is made at the first push. If the engine does not know it any more (it was
    started again, or replicas came and went), a new one is made and the push is tried once more. After any
    other error the group is given up, and the next push makes a new one.

    With NCCL, trainer and engine must not share a GPU. Only gloo, on CPUs, is covered by the project's tests.

    Args:
        target: takes the weights.
        address: this machine's address, as the engine's machines reach it. The group's store listens on all
            interfaces, unprotected, as torch.distributed always does.
        port: the store's port; 0 takes a free one.
        backend: torch's name; by default `nccl` for weights on GPUs, else `gloo`.
        bucket_bytes: how much is on its way at a time; a larger tensor goes alone.
        deadline_s: how long the making of a group, and a push, may take.

    Raises:
        ConfigurationError: a value is out of range.
    """

    def __init__(
        self,
        target: BroadcastTarget,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        backend: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        deadline_s: float = 600.0,
    ) -> None:
        if bucket_bytes < 1 or not deadline_s > 0:
            raise ConfigurationError("bucket_bytes and deadline_s must be positive")
        self._target = target
        self._address = address
        self._port = port
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._deadline_s = deadline_s
        self._name = ""
        self._store: Store | None = None
        self._group: SendingGroup | None = None
        self._lock = asyncio.Lock()

    async def push(self, model: PreTrainedModel | PeftModel, *, version: str) -> None:
        """Send the weights, of a peft model the merged ones; they must not change until this returns.

        Raises:
            PolicyError: the engine refuses them; its old weights keep serving.
            TransportError: the engine, or the group, is gone.
            DeadlineError: it took longer than `deadline_s`; which weights serve is then unknown.
            ConfigurationError: the engine joins no groups, or the tensors are on several devices.
        """
        weights = without_ties(served_model(model).state_dict())
        tensors = {name: tensor.detach() for name, tensor in weights.items()}
        if len({tensor.device for tensor in tensors.values()}) != 1:
            raise ConfigurationError("the weights must be on one device, the broadcast's")
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        async with self._lock:
            try:
                async with asyncio.timeout(self._deadline_s):
                    try:
                        await self._push(tensors, version)
                    except PolicyError as error:
                        if error.code != WEIGHTS_GROUP_UNKNOWN:
                            raise
                        logger.info("%s; making a new group", error)
                        await self._push(tensors, version)
            except TimeoutError as error:
                if isinstance(error, GymError):
                    raise
                raise DeadlineError("the push of weights by broadcast", seconds=self._deadline_s) from error

    async def aclose(self) -> None:
        """Leave the group, on both sides; bounded."""
        async with self._lock:
            await self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _push(self, tensors: Mapping[str, Tensor], version: str) -> None:
        try:
            group = self._group or await self._join(next(iter(tensors.values())).device.type)
            specs = tuple(
                TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in tensors.items()
            )
            source = BroadcastWeights(self._name, specs, self._bucket_bytes)

            async def send() -> None:
                for bucket in in_buckets(specs, self._bucket_bytes):
                    await group.broadcast([tensors[spec.name] for spec in bucket])

            # closing the group ends the engine's wait for it
            await _together(
                self._target.update_weights(source, version=version), send(), on_failure=group.close
            )
        except BaseException:
            # what was begun in it cannot be taken back
            await self._leave()
            raise

    async def _join(self, device: str) -> SendingGroup:
        backend = self._backend or ("nccl" if device == "cuda" else "gloo")
        ranks = await self._target.weight_ranks()
        self._name = f"gym-sdk-{secrets.token_hex(6)}"
        store = self._store = Store(self._address, self._port, deadline_s=self._deadline_s)
        group = WeightsGroup(self._name, self._address, store.port, backend, 1, 1 + ranks)
        self._group = await _together(
            self._target.join_weights_group(group),
            SendingGroup.form(
                store,
                name=group.name,
                world_size=group.world_size,
                backend=backend,
                deadline_s=self._deadline_s,
            ),
        )
        return self._group

    async def _leave(self) -> None:
        name, group, self._name, self._group, self._store = self._name, self._group, "", None, None
        if group is not None:
            group.close()
        if name:
            with suppress(GymError, TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await self._target.leave_weights_group(name)


async def _together(
    engine: Coroutine[Any, Any, None],
    own: Coroutine[Any, Any, T],
    *,
    on_failure: Callable[[], None] = lambda: None,
) -> T:
    """Do both sides of one thing; if one fails, end the other, and prefer the engine's word on why."""
    theirs, ours = asyncio.ensure_future(engine), asyncio.ensure_future(own)
    try:
        await asyncio.wait({theirs, ours}, return_when=asyncio.FIRST_EXCEPTION)
        if theirs.done() and ours.done() and not theirs.exception() and not ours.exception():
            return ours.result()
        if theirs.done() and theirs.exception() is not None:
            theirs.result()
        on_failure()
        await asyncio.wait({theirs}, timeout=_GRACE_S)
        if theirs.done() and theirs.exception() is not None:
            theirs.result()
        return ours.result()
    except BaseException:
        on_failure()  # first: the engine may be waiting for what will not come
        raise
    finally:
        for task in (theirs, ours):
            task.cancel()
        await asyncio.wait({theirs, ours}, timeout=_GRACE_S)
        for task in (theirs, ours):
            if task.done() and not task.cancelled():
                task.exception()  # it has been told, or another's was
