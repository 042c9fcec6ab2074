"""Verifiers that score equal rollouts once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from gym_sdk.errors import ConfigurationError, VerifierError
from gym_sdk.schema import Reward, Rollout
from gym_sdk.verifiers.content import content_key
from gym_sdk.verifiers.protocol import Verifier, run_verifier, verifier_name
from gym_sdk.verifiers.rewards_memory import RewardsMemory

if TYPE_CHECKING:
    from gym_sdk.verifiers.rewards_file import RewardsFile

__all__ = ["CachedVerifier", "cached"]


@dataclass(slots=True)
class _Flight:
    """A verification that is under way. It ends with a reward, an error, or neither: it was cancelled."""

    done: anyio.Event = field(default_factory=anyio.Event)
    reward: Reward | None = None
    error: VerifierError | None = None


class CachedVerifier:
    """A verifier with a memory; see `cached`.

    Attributes:
        hits: rewards that were remembered, or came from a verification under way.
        misses: verifications that ran.
    """

    def __init__(self, verifier: Verifier, rewards: RewardsMemory | RewardsFile, version: str) -> None:
        name = verifier_name(verifier)
        self.__name__ = self.__qualname__ = f"cached({name})"
        self.hits = 0
        self.misses = 0
        self._verifier = verifier
        self._identity = (name, getattr(verifier, "fingerprint", ""), version)
        self._rewards = rewards
        self._flights: dict[tuple[asyncio.AbstractEventLoop, bytes], _Flight] = {}

    async def __call__(self, rollout: Rollout) -> Reward:
        """Score a rollout.

        Raises:
            VerifierError: as the verifier; or the task's answer or metadata has no JSON form.
        """
        key = (asyncio.get_running_loop(), content_key(rollout, self._identity, self.__name__))
        while (flight := self._flights.get(key)) is not None:
            await flight.done.wait()
            if flight.reward is not None:
                self.hits += 1
                return flight.reward
            if flight.error is not None:
                raise VerifierError(str(flight.error), verifier=flight.error.verifier) from flight.error
            # whoever verified was cancelled: the first that gets here takes over
        return await self._fly(key, rollout)

    async def _fly(self, key: tuple[asyncio.AbstractEventLoop, bytes], rollout: Rollout) -> Reward:
        flight = self._flights[key] = _Flight()
        try:
            flight.reward = await self._rewards.get(key[1])
            if flight.reward is not None:
                self.hits += 1
                return flight.reward
            self.misses += 1
            flight.reward = await run_verifier(self._verifier, rollout)
            await self._rewards.put(key[1], flight.reward)
            return flight.reward
        except VerifierError as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.done.set()


def cached(
    verifier: Verifier,
    *,
    path: str | Path | None = None,
    version: str | None = None,
    max_entries: int = 100_000,
) -> CachedVerifier:
    """Make a verifier that scores rollouts of equal content once: for judges, and whatever else is dear.

    Equal are rollouts whose tasks have the same input, instructions, answer and metadata, and which did the
    same: the same items, model calls and way of ending. Ids and tokens don't count. So a verifier that looks
    at anything else, such as tokens, timing or the weight version, must not be cached, nor one that is
    meant to differ from call to call.

    Equal rollouts that are verified at the same time are verified once. If that one is cancelled, another
    takes over; if it fails, all that waited for it fail, and the next one tries anew: failures are not
    remembered.

    Args:
        verifier: what is remembered.
        path: an SQLite file that remembers across runs; several processes of one machine may share it, and
            several verifiers. Without it, memory does, as long as the verifier lives.
        version: names what the verifier is, besides its name; change it whenever its code, prompt or model
            changes. Required with `path`: a file outlives the code.
        max_entries: rewards that are kept. Memory forgets what was not used for longest, a file what was
            written first.

    Raises:
        ConfigurationError: `path` without `version`, a limit below 1, or the file cannot be used.
    """
    if max_entries < 1:
        raise ConfigurationError(f"cached: max_entries must be at least 1, not {max_entries}")
    if path is not None and version is None:
        raise ConfigurationError(
            'cached: a file outlives the code: say which code wrote it, e.g. cached(..., version="1"), and '
            "change that with the verifier"
        )
    return CachedVerifier(verifier, _rewards(path, max_entries), version or "")


def _rewards(path: str | Path | None, max_entries: int) -> RewardsMemory | RewardsFile:
    if path is None:
        return RewardsMemory(max_entries)
    from gym_sdk.verifiers.rewards_file import RewardsFile  # SQLite loads only where it is used

    return RewardsFile(Path(path), max_entries)
