"""One SGLang among several: its engine while it is there, and why it gets no requests while it doesn't."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from backends.engine import ReplicaInfo
from backends.sglang.client import SGLangClient, UnreachableError
from backends.sglang.config import FleetConfig, SGLangConfig
from backends.sglang.engine import SGLangEngine
from backends.sglang.facts import check_log_probs, learn
from backends.sglang.process import SGLangProcess
from gym_sdk.errors import DeadlineError, GymError, TransportError

__all__ = ["Replica"]

logger = logging.getLogger(__name__)

_MISSES = 2


class Replica:
    """One address.

    Attributes:
        url: its root.
        process: its process, if it was started here.
        engine: None while it is away.
        problem: why it gets no requests; None if it may.
        in_flight: how many requests it has from here.
        listed: whether it still belongs to the fleet.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | Path | None,
        api_key: str | None,
        config: SGLangConfig,
        watch: FleetConfig,
        process: SGLangProcess | None = None,
    ) -> None:
        self.url = url
        self.process = process
        self.engine: SGLangEngine | None = None
        self.problem: str | None = "it has not answered yet"
        self.in_flight = 0
        self.listed = True
        self._model = model
        self._api_key = api_key
        self._config = config
        self._watch = watch
        self._client: SGLangClient | None = None
        self._misses = 0
        self._wake = asyncio.Event()

    @property
    def serves(self) -> bool:
        """Whether it may get requests."""
        return self.listed and self.why is None

    @property
    def why(self) -> str | None:
        """Why it gets no requests."""
        if self.engine is None:
            return self.problem or "it is away"
        return self.problem or self.engine.unfit

    @property
    def gone(self) -> bool:
        """Whether it is known that it will not come back."""
        return self.process is not None and self.process.gone

    @property
    def info(self) -> ReplicaInfo:
        """What others may know."""
        restarts = self.process.restarts if self.process is not None else 0
        return ReplicaInfo(self.url, self.serves, self.in_flight, restarts, self.why)

    async def connect(self) -> SGLangEngine:
        """Connect to it, without giving it requests yet; raises as `SGLangEngine.connect` does."""
        diagnose = self.process.diagnosis if self.process is not None else None
        client = SGLangClient(self.url, api_key=self._api_key, config=self._config, diagnose=diagnose)
        try:
            facts = await learn(client, model=self._model)
            await check_log_probs(client, facts.vocab_size - 1)
        except BaseException:
            await client.aclose()
            raise
        self._client, self._misses = client, 0
        return SGLangEngine(client, facts)

    async def ailing(self) -> str | None:
        """Ask it something that its scheduler must answer; return why it is to be left out, if it is."""
        assert self._client is not None
        if self.process is not None and (ended := self.process.diagnosis()) is not None:
            return ended
        try:
            async with asyncio.timeout(self._watch.health_s):
                await self._client.get("/server_info")
        except UnreachableError as error:
            return str(error)
        except (TransportError, DeadlineError, TimeoutError) as error:
            self._misses += 1
            if self._misses < _MISSES:
                return None
            return f"it did not answer {_MISSES} times ({type(error).__name__}: {error})"
        self._misses = 0
        return None

    async def lose(self, why: str) -> None:
        """Take it out: its requests end with a `TransportError` that may be retried."""
        engine, self.engine, self.problem = self.engine, None, why
        if engine is not None:
            logger.warning("SGLang at %s is left out: %s", self.url, why)
            await engine.drop(TransportError(f"SGLang at {self.url} was lost: {why}", retryable=True))

    async def post(
        self, path: str, body: Mapping[str, Any], *, within_s: float | None = None
    ) -> dict[str, Any]:
        """Send something else to it; raises as `SGLangClient.post` does."""
        assert self._client is not None
        return await self._client.post(path, body, within_s=within_s)

    async def aclose(self) -> None:
        """Close its engine."""
        engine, self.engine, self.problem = self.engine, None, "the engine is closed"
        if engine is not None:
            await engine.aclose()

    def suspect(self) -> None:
        """Have it looked at now."""
        self._wake.set()

    async def rest(self) -> None:
        """Wait until it is to be looked at again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._watch.check_s):
                await self._wake.wait()
        self._wake.clear()

    def give_up(self) -> None:
        """Keep how its process ended for good."""
        assert self.process is not None
        self.problem = self.process.diagnosis()

    def note(self, error: GymError) -> None:
        """Keep why it could not be taken in."""
        if str(error) != self.problem:
            logger.warning("SGLang at %s is left out: %s", self.url, error)
        self.problem = str(error)
