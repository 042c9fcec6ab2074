"""The LoRA adapters that one engine has loaded into SGLang."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path

from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.flight import Flights
from backends.sglang.weights.adapter import Adapter, check_adapter
from gym_sdk.errors import CheckpointError, ConfigurationError, GymError, PolicyError

__all__ = ["Adapters"]

logger = logging.getLogger(__name__)


class Adapters:
    """Loads adapters, each under a name of its own, and unloads those that nothing uses any more.

    Keys and values of one adapter never serve another: SGLang files its prefix cache under an id that it
    draws for each load.

    Attributes:
        current: what samples new requests; None is the base model.
    """

    def __init__(self, client: SGLangClient, facts: Facts, flights: Flights) -> None:
        self.current: Adapter | None = None
        self._client = client
        self._facts = facts
        self._flights = flights
        self._loaded: list[Adapter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, folder: Path, version: str, *, base: str) -> None:
        """Have new requests sampled with an adapter; running ones finish with what they began with.

        Raises:
            CheckpointError: the folder cannot be served exactly, or SGLang refuses it.
            ConfigurationError: SGLang runs without LoRA.
            TransportError: SGLang does not answer.
        """
        limits = self._facts.lora
        if limits is None:
            raise ConfigurationError(
                "this SGLang takes no adapters; start it with --enable-lora --max-lora-rank 32 "
                "--lora-target-modules all, or merge the adapter and push full weights"
            )
        self._facts.check_alone("adapters")
        await asyncio.to_thread(check_adapter, folder, limits, self._facts.signature)
        adapter = Adapter(f"{version}@{secrets.token_hex(6)}", version, base)
        body = {"lora_name": adapter.name, "lora_path": str(folder), "pinned": False}
        try:
            await self._client.post("/load_lora_adapter", body, within_s=self._client.config.update_s)
        except BaseException as error:
            self._start(adapter)  # it may be there all the same
            if isinstance(error, PolicyError):
                raise CheckpointError(f"{error}; the weights from before are serving", path=folder) from error
            raise
        self._loaded.append(adapter)
        self.current = adapter
        self.sweep()
        logger.debug("the adapter is now of version %s", version)

    def drop(self) -> None:
        """Have new requests sampled with the base model."""
        self.current = None
        self.sweep()

    def sweep(self) -> None:
        """Unload what neither new nor running requests use."""
        used = {flight.adapter for flight in self._flights} | {self.current}
        for adapter in [adapter for adapter in self._loaded if adapter not in used]:
            self._loaded.remove(adapter)
            self._start(adapter)

    async def aclose(self) -> None:
        """Unload everything; bounded by the client's deadline."""
        self.drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, adapter: Adapter) -> None:
        task = asyncio.ensure_future(self._unload(adapter))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, adapter: Adapter) -> None:
        try:
            await self._client.post("/unload_lora_adapter", {"lora_name": adapter.name})
        except GymError as error:
            # it costs memory, no more: nothing is ever sent to its name again
            logger.debug("the adapter %s was not unloaded: %s", adapter.name, error)
