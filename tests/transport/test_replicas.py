"""Several replicas are told one thing: their weights, and the groups over which those come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.scripted import ScriptedTransport, say

from gym_sdk.errors import ConfigurationError, GymError, PolicyError, TransportError
from gym_sdk.schema import ResponseRequest
from gym_sdk.schema.weights import WeightsGroup
from gym_sdk.transport import Replicas

pytestmark = pytest.mark.asyncio

GROUP = WeightsGroup("sync", "10.0.0.1", 2000, "gloo", first_rank=1, world_size=8)


class Node(ScriptedTransport):
    """A replica with some ranks, which fails to do what it is told with an error."""

    def __init__(self, name: str, ranks: int = 1, error: GymError | None = None) -> None:
        super().__init__(lambda request: say(name))
        self.base_url = name
        self.ranks = ranks
        self.error = error
        self.groups: list[WeightsGroup] = []
        self.left: list[str] = []
        self.is_open = False

    async def open(self) -> None:
        if self.error is not None:
            raise self.error
        self.is_open = True

    async def update_weights(self, source: Any, *, version: str) -> None:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        await super().update_weights(source, version=version)

    async def weight_ranks(self) -> int:
        return self.ranks

    async def join_weights_group(self, group: WeightsGroup) -> None:
        if self.error is not None:
            raise self.error
        self.groups.append(group)

    async def leave_weights_group(self, name: str) -> None:
        self.left.append(name)


async def test_all_replicas_get_the_weights() -> None:
    nodes = [Node("a"), Node("b")]
    replicas = Replicas(nodes)
    await replicas.update_weights("folder", version="7")
    assert [node.pushed for node in nodes] == [[("folder", "7")]] * 2
    assert replicas.versions == {"a": "7", "b": "7"}


@pytest.mark.parametrize(
    ("error", "kind", "version"),
    [
        (PolicyError("another shape", status=400, code="bad"), PolicyError, "1"),
        (TransportError("gone", retryable=True), TransportError, None),
    ],
)
async def test_an_update_that_fails_at_some_says_who_has_which(
    error: GymError, kind: type[GymError], version: str | None
) -> None:
    good, bad = Node("http://a/v1"), Node("http://b/v1")
    replicas = Replicas([good, bad])
    await replicas.update_weights("folder", version="1")
    bad.error = error
    with pytest.raises(kind, match=r"http://a/v1 got the weights '2'; http://b/v1 has not: ") as caught:
        await replicas.update_weights("folder", version="2")
    assert replicas.versions == {"http://a/v1": "2", "http://b/v1": version}
    assert getattr(caught.value, "code", None) == getattr(error, "code", None)
    assert good.pushed[-1] == ("folder", "2")


async def test_a_transport_error_outweighs_a_refusal() -> None:
    refusing, gone = (
        Node("a", error=PolicyError("no")),
        Node("b", error=TransportError("gone", retryable=False)),
    )
    with pytest.raises(TransportError, match="a has not: no; b has not: gone") as caught:
        await Replicas([refusing, gone]).update_weights("folder", version="1")
    assert not caught.value.retryable
    with pytest.raises(PolicyError, match=r"^no$"):
        await Replicas([refusing]).update_weights("folder", version="1")


async def test_each_replica_joins_after_the_ranks_of_those_before() -> None:
    nodes = [Node("a", 2), Node("b", 1), Node("c", 4)]
    replicas = Replicas(nodes)
    assert await replicas.weight_ranks() == 7
    await replicas.join_weights_group(GROUP)
    assert [node.groups[0].first_rank for node in nodes] == [1, 3, 4]
    await replicas.leave_weights_group("sync")
    assert [node.left for node in nodes] == [["sync"]] * 3
    nodes[0].ranks = 3
    with pytest.raises(ConfigurationError, match="the ranks 1 to 8, but the group's world_size is 8"):
        await replicas.join_weights_group(GROUP)


async def test_calls_take_turns_and_closing_closes_all() -> None:
    nodes = [Node("a"), Node("b")]
    replicas = Replicas(nodes)
    await replicas.open()
    texts = {(await replicas.respond(ResponseRequest(input="q"))).output_text for _ in range(2)}
    assert texts == {"a", "b"}
    await replicas.aclose()
    assert all(node.closed for node in nodes)


async def test_all_open_or_none() -> None:
    one, other = Node("a"), Node("b", error=ConfigurationError("no model"))
    with pytest.raises(ConfigurationError, match="no model"):
        await Replicas([one, other]).open()
    assert one.is_open
    assert one.closed


async def test_misuse() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        Replicas([])
    with pytest.raises(ConfigurationError, match="address of its own"):
        Replicas([Node("a"), Node("a")])
    with pytest.raises(ConfigurationError, match="no address"):
        await Replicas([Node("a")]).serving()
