"""The process groups in which SGLang receives weights."""

from __future__ import annotations

from backends.engine import WeightsGroup
from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.weights.carriers import unknown_group
from gym_sdk.errors import ConfigurationError, PolicyError

__all__ = ["Groups"]


class Groups:
    """Joins and leaves groups; knows which it is in, as SGLang itself cannot be asked."""

    def __init__(self, client: SGLangClient, facts: Facts) -> None:
        self._client = client
        self._facts = facts
        self._joined: set[str] = set()

    async def join(self, group: WeightsGroup) -> None:
        """Have SGLang join; see `RemoteEngine.join_group`."""
        self._facts.check_alone("broadcasts")
        ranks = self._facts.ranks
        if group.first_rank + ranks > group.world_size:
            raise ConfigurationError(
                f"this SGLang takes {ranks} ranks from {group.first_rank} on; "
                f"the group has {group.world_size}"
            )
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": group.first_rank,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._client.post("/init_weights_update_group", body)
        self._joined.add(group.name)

    async def leave(self, name: str) -> None:
        """Have SGLang leave; a group that it does not know is left."""
        self._joined.discard(name)
        try:
            await self._client.post("/destroy_weights_update_group", {"group_name": name})
        except PolicyError as error:
            if "does not exist" not in str(error):
                raise

    def check(self, name: str) -> None:
        """See that SGLang has joined a group.

        Raises:
            PolicyError: it has not; the code is `weights_group_unknown`.
        """
        if name not in self._joined:
            raise unknown_group(name)

    def forget(self, name: str) -> None:
        """Note that SGLang does not know a group any more."""
        self._joined.discard(name)
