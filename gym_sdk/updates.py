"""New weights for the policy that a client talks to."""

from __future__ import annotations

from abc import ABC, abstractmethod

from gym_sdk.rollout.deadline import within
from gym_sdk.rollout.staleness import WeightClock
from gym_sdk.schema.weights import WeightsGroup
from gym_sdk.transport import AnyWeights, Transport

__all__ = ["WeightUpdates"]


class WeightUpdates(ABC):
    """The part of a client that a trainer pushes weights through.

    Attributes:
        transport: reaches the policy, or all of its replicas.
        weights: the order of the versions; tells how old a rollout is.
    """

    transport: Transport
    weights: WeightClock

    @abstractmethod
    def _opened(self) -> object:
        """Return if the client is open.

        Raises:
            ConfigurationError: it is not.
        """

    async def update_weights(
        self,
        source: AnyWeights,
        *,
        version: str,
        deadline_s: float = 600.0,
    ) -> None:
        """Replace the policy's weights.

        Args:
            source: a folder in the Hugging Face layout that the server sees; tensors by parameter name; or,
                with SGLang, an `AdapterWeights` or a `BroadcastWeights` (see `gym_sdk.grpo.BroadcastSync`).
            version: labels the tokens that these weights will sample.
            deadline_s: how long it may take, in seconds.

        Raises:
            PolicyError: the weights cannot be used; the old ones keep serving.
            TransportError: the server was not reached.
            DeadlineError: it did not finish in time; which weights serve is then unknown.
        """
        self._opened()
        await within("the weight update", deadline_s, self.transport.update_weights(source, version=version))
        self.weights.advance(version)

    async def weight_ranks(self) -> int:
        """Return how many ranks the policy's engine takes in a weights group.

        Raises:
            ConfigurationError: the engine is embedded, and joins none.
            PolicyError: the server's engine joins none.
            TransportError: the server was not reached.
        """
        self._opened()
        return await self.transport.weight_ranks()

    async def join_weights_group(self, group: WeightsGroup, *, deadline_s: float = 120.0) -> None:
        """Have the policy's engine join a process group, over which `BroadcastWeights` come.

        Rank 0 must be listening already; this returns when all ranks are there.

        Raises:
            ConfigurationError: the engine is embedded, and joins none.
            PolicyError: the group did not come together, or the server's engine joins none.
            TransportError: the server was not reached.
            DeadlineError: it took longer than `deadline_s` seconds.
        """
        self._opened()
        joining = self.transport.join_weights_group(group)
        await within("the weights group's coming together", deadline_s, joining)

    async def leave_weights_group(self, name: str) -> None:
        """Have the policy's engine leave a group; without effect on one that it does not know (any more)."""
        self._opened()
        await self.transport.leave_weights_group(name)
