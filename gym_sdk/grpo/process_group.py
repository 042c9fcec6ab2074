"""Rank 0 of a process group that reaches into engines: torch.distributed without a default group."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from gym_sdk.errors import ConfigurationError, DeadlineError, TransportError

__all__ = ["SendingGroup", "Store"]

_POLL_S = 0.001
_DESTROY_POLL_S = 0.05
T = TypeVar("T")


class Store:
    """Where the ranks of one group find each other; listens from the beginning, in threads of torch's own.

    Attributes:
        port: where it listens.

    Args:
        address: the address to listen on, as the other ranks reach it.
        port: the port to listen on; 0 takes a free one.
        deadline_s: how long each step of a rank may take.

    Raises:
        ConfigurationError: it cannot be listened on.
    """

    def __init__(self, address: str, port: int, *, deadline_s: float) -> None:
        timeout = timedelta(seconds=deadline_s)
        try:
            self.store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, is_master=True, wait_for_workers=False, timeout=timeout
            )
        except (dist.DistError, OSError, RuntimeError, ValueError) as error:
            raise ConfigurationError(f"cannot listen on {address}:{port}: {error}") from error
        self.port: int = self.store.port


class SendingGroup:
    """Sends tensors to all other ranks.

    No call blocks the event loop, and none waits longer than its deadline. What torch itself goes on waiting
    for after that ends with the group's own timeout, in a thread that keeps nothing else from ending.
    """

    def __init__(self, group: dist.ProcessGroup, deadline_s: float) -> None:
        self._group: dist.ProcessGroup | None = group
        self._works: list[dist.Work] = []
        self._deadline_s = deadline_s

    @classmethod
    async def form(
        cls, store: Store, *, name: str, world_size: int, backend: str, deadline_s: float
    ) -> SendingGroup:
        """Come together with the other ranks.

        Raises:
            TransportError: it failed.
            DeadlineError: they were not all there in time.
        """
        timeout = timedelta(seconds=deadline_s)

        def form() -> dist.ProcessGroup:
            # as SGLang does, so that both find the same keys in the store; `new_group` needs a default group
            group, _ = distributed_c10d._new_process_group_helper(
                world_size,
                0,
                [],
                distributed_c10d.Backend(backend),
                distributed_c10d.PrefixStore(name, store.store),
                group_name=name,  # type: ignore[arg-type]  # older versions of torch have no type for it
                timeout=timeout,
            )
            distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
            assert isinstance(group, dist.ProcessGroup)
            return group

        try:
            async with asyncio.timeout(deadline_s):
                return cls(await _in_thread(form), deadline_s)
        except TimeoutError as error:
            raise DeadlineError(f"the weights group {name!r}", seconds=deadline_s) from error
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise TransportError(f"the weights group {name!r} failed: {error}", retryable=True) from error

    async def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors; return when torch has handed them over.

        Raises:
            TransportError: another rank is gone.
            DeadlineError: they were not taken in time.
        """
        if self._group is None:
            raise TransportError("the weights group is closed", retryable=True)
        until = time.monotonic() + self._deadline_s
        try:
            for tensor in tensors:
                begun = dist.broadcast(tensor, src=0, group=self._group, async_op=True)
                assert begun is not None
                self._works.append(begun)
            while self._works:
                work = self._works[0]
                # polled: `wait` would hold a thread, which nobody could take back
                while not work.is_completed():
                    if time.monotonic() > until:
                        raise DeadlineError("the broadcast of weights", seconds=self._deadline_s)
                    await asyncio.sleep(_POLL_S)
                self._works.pop(0)
                work.wait()
        except (dist.DistError, RuntimeError) as error:
            raise TransportError(f"the broadcast of weights failed: {error}", retryable=True) from error
        if tensors and tensors[0].is_cuda:
            await _in_thread(torch.cuda.synchronize)

    def close(self) -> None:
        """Leave the group as soon as nothing is under way in it any more; returns at once."""
        group, self._group = self._group, None
        works, self._works = self._works, []
        if group is not None:
            threading.Thread(
                target=_destroy, args=(group, works, self._deadline_s), name="gym-sdk-group", daemon=True
            ).start()


def _destroy(group: dist.ProcessGroup, works: list[dist.Work], within_s: float) -> None:
    """End a group: whoever lets go of one in which something is under way has to wait for it."""
    until = time.monotonic() + within_s + 1.0
    while time.monotonic() < until and not all(work.is_completed() for work in works):
        time.sleep(_DESTROY_POLL_S)
    with suppress(Exception):  # torch's own; it is gone in either case
        dist.destroy_process_group(group)


async def _in_thread(call: Callable[[], T]) -> T:
    """Run a blocking call in a daemon thread, which is left behind if this is cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    return await future
