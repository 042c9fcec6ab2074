"""Calls over replicas: retries, budgets, circuits, overload, affinity, and an end to every wait."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from support.faulty_server import HOLD, READ, Seen, Step, answer, listening
from support.held import until
from support.scripted import ScriptedTransport, say

from gym_sdk.errors import ConfigurationError, DeadlineError, PolicyError, TokenContractError, TransportError
from gym_sdk.schema import Response, ResponseRequest
from gym_sdk.transport import Breaker, CircuitState, Dispatch, Retry
from gym_sdk.transport.http import HttpTransport

pytestmark = pytest.mark.asyncio

ASK = ResponseRequest(input="q")
QUICK = Retry(attempts=4, base_s=0.001, max_s=0.01)
BRIEF = Breaker(failures=3, probe_s=0.01, max_probe_s=0.02, patience_s=30.0)
LAZY = Breaker(failures=1000)
BODY: dict[str, Any] = {
    "id": "resp_1",
    "created_at": 1.0,
    "model": "policy",
    "output": [{"type": "message", "role": "assistant", "content": "hi"}],
}


class Node:
    """A replica in this process, which a test breaks and mends."""

    takes_request_ids = True

    def __init__(self, name: str = "http://a/v1", *, room: int = 10**6) -> None:
        self.base_url = name
        self.room = room
        self.down = False
        self.calls = 0
        self.probes = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.refused = 0
        self.ids: list[tuple[str | None, int]] = []
        self.act: Callable[[int], Awaitable[Any]] | None = None

    async def respond(
        self,
        request: ResponseRequest,
        *,
        token_form: str = "item",
        request_id: str | None = None,
        attempt: int = 1,
    ) -> Response:
        self.calls += 1
        self.ids.append((request_id, attempt))
        if self.in_flight >= self.room:
            self.refused += 1
            raise TransportError("too many", retryable=True, status=429, retry_after_s=0.02)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            if self.down:
                raise TransportError(f"{self.base_url} is down", retryable=True)
            if self.act is not None:
                await self.act(self.calls)
        finally:
            self.in_flight -= 1
        return say("x")

    async def probe(self) -> None:
        self.probes += 1
        if self.down:
            raise TransportError("still down", retryable=True)


@asynccontextmanager
async def over(*nodes: Any, retry: Retry = QUICK, breaker: Breaker = BRIEF) -> AsyncIterator[Dispatch]:
    dispatch = Dispatch(nodes, retry=retry, breaker=breaker)
    try:
        yield dispatch
    finally:
        await dispatch.aclose()


def failing(*errors: Exception) -> Callable[[int], Awaitable[None]]:
    """Fail the first calls with these."""

    async def act(number: int) -> None:
        if number <= len(errors):
            raise errors[number - 1]

    return act


def status(code: int) -> TransportError:
    return TransportError(f"answered {code}", retryable=True, status=code)


async def test_each_try_of_a_call_has_the_calls_id() -> None:
    node = Node()
    node.act = failing(status(500), status(408))
    async with over(node) as dispatch:
        found = await dispatch.respond(ASK, request_id="call")
        assert (found.retries, found.replica) == (2, "http://a/v1")
        [health] = dispatch.health()
    assert node.ids == [("call", 1), ("call", 2), ("call", 3)]
    assert (health.tries, health.retries, health.in_flight) == (3, 2, 0)
    assert (health.failures["broken"], health.failures["passing"]) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [
        PolicyError("no"),
        TokenContractError("no"),
        TransportError("no", retryable=False),
        ConfigurationError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_is_final_is_not_tried_again_and_opens_nothing(error: Exception) -> None:
    node = Node()
    node.act = failing(*[error] * 20)
    async with over(node) as dispatch:
        for _ in range(10):
            with pytest.raises(type(error), match="no"):
                await dispatch.respond(ASK)
        assert dispatch.health()[0].state is CircuitState.CLOSED
    assert node.calls == 10


async def test_tries_are_bounded() -> None:
    node = Node()
    node.act = failing(*[status(500)] * 9)
    async with over(node, breaker=LAZY) as dispatch:
        with pytest.raises(TransportError, match="answered 500"):
            await dispatch.respond(ASK)
        assert node.calls == 4
    node.calls = 0
    async with over(node, retry=Retry(attempts=1)) as dispatch:
        with pytest.raises(TransportError, match="answered 500"):
            await dispatch.respond(ASK)
        assert node.calls == 1


async def test_retries_have_a_budget() -> None:
    node = Node()
    node.act = failing(*[status(500)] * 10_000)
    retry = Retry(attempts=4, base_s=0.0, budget=0.1, reserve=5.0)
    async with over(node, retry=retry, breaker=LAZY) as dispatch:
        ends = [await outcome(dispatch) for _ in range(100)]
        assert node.calls == 100 + 5
        assert "Retry.budget" in ends[-1]
        node.act = None
        for _ in range(20):
            await dispatch.respond(ASK)
        node.act = failing(*[status(500)] * (node.calls + 2))
        await dispatch.respond(ASK)  # what succeeded has earned two retries


async def outcome(dispatch: Dispatch, **options: Any) -> str:
    try:
        return (await dispatch.respond(ASK, **options)).replica
    except TransportError as error:
        return str(error)


async def test_an_outage_costs_no_call(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    async with over(node) as dispatch:
        await dispatch.respond(ASK)
        node.down = True
        with caplog.at_level(logging.INFO, "gym_sdk.transport.dispatch"):
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(dispatch.respond(ASK)) for _ in range(500)]
                await until(lambda: node.probes >= 5)
                [health] = dispatch.health()
                assert (health.state, health.in_flight, health.opened) == (CircuitState.OPEN, 0, 1)
                assert node.calls < 1 + 500 + 10  # nobody knocked but the probes
                node.down = False
        assert all(call.result().replica == node.base_url for call in calls)
        [health] = dispatch.health()
        assert (health.state, health.opened) == (CircuitState.CLOSED, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "is out after 19 failures in a row" in caplog.messages[0]
    assert "answers again" in caplog.messages[1]


async def test_failures_by_chance_open_nothing_while_much_is_in_flight() -> None:
    node = Node()
    chance, numbers = random.Random(1), itertools.count()

    async def act(_: int) -> None:
        if next(numbers) < 1800 and chance.random() < 0.15:
            raise status(500)

    node.act = act
    async with over(node) as dispatch:
        await asyncio.gather(*(dispatch.respond(ASK) for _ in range(2000)))
        [health] = dispatch.health()
    assert health.failures["broken"] > 200
    assert health.opened == 0


async def test_an_outage_for_ever_ends_every_call_in_time_and_the_next_at_once() -> None:
    node = Node()
    breaker = Breaker(failures=3, probe_s=0.01, max_probe_s=0.02, patience_s=0.3)
    async with over(node, breaker=breaker) as dispatch:
        await dispatch.respond(ASK)
        node.down = True
        ends = await asyncio.gather(*(outcome(dispatch) for _ in range(200)))
        assert {end.partition(" for ")[0] for end in ends} == {"no replica has answered"}
        assert all("Breaker.patience_s" in end and node.base_url in end for end in ends)
        calls = node.calls
        for _ in range(200):
            assert "no replica has answered" in await outcome(dispatch)
        assert node.calls == calls
        node.down = False
        await until(lambda: dispatch.health()[0].state is CircuitState.HALF_OPEN)
        assert await outcome(dispatch) == node.base_url


async def test_who_never_answered_is_waited_for_less() -> None:
    node = Node()
    node.down = True
    breaker = Breaker(failures=1, probe_s=0.01, patience_s=1000.0, first_patience_s=0.05)
    async with over(node, breaker=breaker) as dispatch:
        assert "the last failure of each: http://a/v1 is down" in await outcome(dispatch)


async def test_a_server_that_says_it_is_well_and_fails_every_call_ends_calls_by_their_tries() -> None:
    node = Node()
    node.act = failing(*[status(500)] * 1000)
    async with over(node) as dispatch:
        with pytest.raises(TransportError, match="answered 500"):
            await dispatch.respond(ASK)
        assert dispatch.health()[0].opened == 1
    assert node.calls == 5  # the one that opened the circuit is not counted


async def test_calls_go_where_the_circuit_is_closed() -> None:
    one, two = Node("http://a/v1"), Node("http://b/v1")
    async with over(one, two) as dispatch:
        for _ in range(4):
            await dispatch.respond(ASK)
        assert (one.calls, two.calls) == (2, 2)
        one.down = True
        ends = await asyncio.gather(*(outcome(dispatch, affinity="g") for _ in range(50)))
        assert set(ends) == {two.base_url}
        calls = one.calls
        ends = [await outcome(dispatch) for _ in range(50)]
        assert set(ends) == {two.base_url}
        assert one.calls == calls
        one.down = False
        await until(lambda: dispatch.health()[0].state is CircuitState.HALF_OPEN)
        ends = [await outcome(dispatch) for _ in range(4)]
        assert set(ends) == {one.base_url, two.base_url}
        assert dispatch.health()[0].state is CircuitState.CLOSED


async def test_429_never_opens_the_circuit_and_costs_no_call() -> None:
    node = Node(room=8)

    async def work(_: int) -> None:
        await asyncio.sleep(0.002)

    node.act = work
    async with over(node, retry=Retry(attempts=2, base_s=0.001, max_s=0.05, reserve=0.0)) as dispatch:
        ends = await asyncio.gather(*(outcome(dispatch) for _ in range(400)))
        [health] = dispatch.health()
    assert set(ends) == {node.base_url}
    assert (health.state, health.opened) == (CircuitState.CLOSED, 0)
    assert health.limit <= 9  # it found out how many the server takes
    assert node.most_in_flight <= 8
    assert node.refused <= 400  # and did not hammer it


async def test_429_for_ever_ends() -> None:
    node = Node(room=0)
    breaker = Breaker(patience_s=0.1)
    async with over(node, breaker=breaker) as dispatch:
        assert "too many; so it was for" in await outcome(dispatch)


async def test_a_try_that_takes_too_long_is_tried_again_elsewhere() -> None:
    stuck, well = Node("http://a/v1"), Node("http://b/v1")

    async def never(_: int) -> None:
        await asyncio.Event().wait()

    stuck.act = never
    async with over(stuck, well) as dispatch:
        found = await dispatch.respond(ASK, try_s=0.05)
        assert (found.replica, found.retries) == (well.base_url, 1)
        assert stuck.in_flight == 0
    async with over(stuck, breaker=LAZY) as dispatch:
        with pytest.raises(
            DeadlineError,
            match=r"a model call to http://a/v1 \(Deadlines.model_call_s\) did not finish .* 0\.02 s",
        ):
            await dispatch.respond(ASK, try_s=0.02)


async def test_waiting_for_a_place_is_not_part_of_a_try() -> None:
    class Narrow(Node):
        max_connections = 1

    node = Narrow()

    async def work(_: int) -> None:
        await asyncio.sleep(0.03)

    node.act = work
    async with over(node) as dispatch:
        found = await asyncio.gather(*(dispatch.respond(ASK, try_s=5.0) for _ in range(10)))
        assert node.most_in_flight == 1
        assert all(one.retries == 0 for one in found)


async def test_cancelling_leaves_nothing_behind() -> None:
    class Narrow(Node):
        max_connections = 2

    node = Narrow()

    async def never(_: int) -> None:
        await asyncio.Event().wait()

    node.act = never
    async with over(node) as dispatch:
        calls = [asyncio.create_task(dispatch.respond(ASK, try_s=60.0)) for _ in range(20)]
        await until(lambda: node.in_flight == 2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        [health] = dispatch.health()
        assert (health.in_flight, health.waiting) == (0, 0)
        node.act = None
        await asyncio.wait_for(dispatch.respond(ASK), 5)


async def test_a_deadline_around_the_call_stays_the_callers() -> None:
    node = Node()

    async def never(_: int) -> None:
        await asyncio.Event().wait()

    node.act = never
    async with over(node) as dispatch:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.02):
                await dispatch.respond(ASK, try_s=60.0)
        assert not isinstance(caught.value, DeadlineError)
        assert dispatch.health()[0].failures["broken"] == 0


async def test_a_group_stays_on_its_replica_until_that_is_crowded() -> None:
    nodes = [Node(f"http://{name}/v1") for name in "abc"]
    release = asyncio.Event()

    async def hold(_: int) -> None:
        await release.wait()

    async with over(*nodes) as dispatch:
        for _ in range(5):
            homes = {g: {await outcome(dispatch, affinity=g) for _ in range(4)} for g in ("g1", "g2", "g3")}
            assert all(len(home) == 1 for home in homes.values())
        assert {home for homes_of in homes.values() for home in homes_of} == {node.base_url for node in nodes}
        for node in nodes:
            node.act = hold
        async with asyncio.TaskGroup() as tasks:
            for _ in range(60):
                tasks.create_task(dispatch.respond(ASK, affinity="g1"))
            await until(lambda: sum(node.in_flight for node in nodes) == 60)
            assert sorted(node.in_flight for node in nodes)[0] >= 10
            release.set()


async def test_transports_that_know_nothing_of_this_are_enough() -> None:
    answers: Iterator[Any] = iter([status(500), status(500), status(500), say("x")])
    transport = ScriptedTransport(lambda request: next(answers))
    async with over(transport) as dispatch:
        found = await dispatch.respond(ASK, request_id="call", affinity="g")
    assert (found.retries, found.replica) == (3, "replica 0")


async def test_misuse() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        Dispatch([])
    with pytest.raises(ConfigurationError, match="failures"):
        Breaker(failures=0)
    with pytest.raises(ConfigurationError, match="probe_s"):
        Breaker(probe_s=0.0)
    with pytest.raises(ConfigurationError, match="patience_s"):
        Breaker(patience_s=float("nan"))
    with pytest.raises(ConfigurationError, match="budget"):
        Retry(budget=-1.0)


async def test_closing_ends_those_that_wait() -> None:
    node = Node()
    node.down = True
    async with over(node) as dispatch:
        call = asyncio.create_task(dispatch.respond(ASK))
        await until(lambda: node.probes > 0)
    with pytest.raises(ConfigurationError, match="was closed"):
        await call
    assert len(asyncio.all_tasks()) == 1


def echo(seen: Seen) -> bytes:
    return answer(BODY, headers={"X-Request-Id": seen.headers.get("x-request-id", "none")})


async def test_a_server_that_restarts_costs_no_call() -> None:
    serving: list[Step] = [READ, echo] * 200
    async with AsyncExitStack() as stack:
        async with listening(serving) as server:
            transport = HttpTransport(server.url)
            stack.push_async_callback(transport.aclose)
            await transport.open()
            dispatch = await stack.enter_async_context(over(transport))
            await dispatch.respond(ASK, request_id="first")
            server.scripts = [[READ, HOLD]]
            calls = [asyncio.create_task(dispatch.respond(ASK, request_id=f"c{n}")) for n in range(64)]
            await until(lambda: len(server.seen) >= 65)
        # every connection was reset, and nobody listens
        await until(lambda: dispatch.health()[0].state is CircuitState.OPEN)
        server.scripts = [serving]
        async with listening(server=server):
            found = await asyncio.gather(*calls)
            assert {one.response.id for one in found} == {"resp_1"}
            asked = [seen.headers for seen in server.seen if seen.path == "/v1/responses"]
            assert {headers["idempotency-key"] for headers in asked} == {
                "first",
                *(f"c{n}" for n in range(64)),
            }
            assert len({headers["x-request-id"] for headers in asked}) == len(asked)
            assert dispatch.health()[0].opened == 1


@pytest.mark.parametrize("seed", range(4))
async def test_in_chaos_every_call_ends_and_no_place_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    nodes = [Node(f"http://{name}/v1", room=chance.choice([3, 10, 1000])) for name in "abc"]

    async def act(_: int) -> None:
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01]))
        if (lot := chance.random()) < 0.2:
            raise [status(500), status(408), PolicyError("no"), TransportError("cut", retryable=False)][
                int(lot * 20)
            ]

    async def shake() -> None:
        while True:
            await asyncio.sleep(0.005)
            chance.choice(nodes).down ^= True

    for node in nodes:
        node.act = act
    breaker = Breaker(failures=2, probe_s=0.002, max_probe_s=0.01, patience_s=0.5)
    async with over(*nodes, breaker=breaker) as dispatch:
        shaking = asyncio.create_task(shake())
        calls = [
            asyncio.create_task(dispatch.respond(ASK, affinity=f"g{n % 20}", request_id=f"c{n}", try_s=0.5))
            for n in range(600)
        ]
        for _ in range(100):
            await asyncio.sleep(0.001)
            chance.choice(calls).cancel()
        async with asyncio.timeout(30):
            await asyncio.wait(calls)
        shaking.cancel()
        await asyncio.wait([shaking])
        for health in dispatch.health():
            assert (health.in_flight, health.waiting) == (0, 0)
            assert health.tries >= sum(health.failures.values())
        assert all(node.in_flight == 0 for node in nodes)
        ends = [call.exception() for call in calls if not call.cancelled()]
        assert all(
            end is None or isinstance(end, TransportError | PolicyError | DeadlineError) for end in ends
        )
        assert None in ends
