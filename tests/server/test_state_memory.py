"""What the store in memory counts, and what goes first."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stored import stored

from backends.server.state import MemoryStore, StateLimits, StoredResponse
from backends.server.state.ledger import ChainLedger
from gym_sdk.tokens import CallTokens


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def expected_tokens(kept: list[StoredResponse]) -> set[int]:
    """The calls that the kept responses and what they continue need, by identity."""
    needed: set[int] = set()
    for one in kept:
        call: CallTokens | None = one.response.tokens
        while call is not None:
            needed.add(id(call))
            call = call.parent
    return needed


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "keep", "again", "get", "delete", "wait"]),
        st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=60,
)


@given(steps=STEPS, max_bytes=st.integers(1, 120_000), max_responses=st.integers(1, 12))
@settings(deadline=None)
def test_nothing_is_counted_twice_or_left_behind(
    steps: list[tuple[str, int, bool]], max_bytes: int, max_responses: int
) -> None:
    async def run() -> None:
        clock = Clock()
        limits = StateLimits(max_bytes=max_bytes, max_responses=max_responses, ttl_s=10)
        store = MemoryStore(limits, clock=clock)
        made: list[StoredResponse] = []
        for step, number, shares in steps:
            chosen = made[number % len(made)] if made else None
            if step == "keep":
                made.append(stored("x", previous=chosen, shares=shares, new_tokens=number, size=number))
                await store.keep(made[-1])
                assert await store.get(made[-1].id, "") is made[-1]
            elif chosen is None:
                continue
            elif step == "again":
                await store.keep(chosen)
            elif step == "get":
                await store.get(chosen.id, "")
            elif step == "delete":
                await store.delete(chosen.id, "")
                assert await store.get(chosen.id, "") is None
            else:
                clock.now += number % 11
            assert len(store) <= max_responses
            assert store.bytes <= max_bytes or len(store) == 1
            kept = [one for one in made if await store.get(one.id, "") is not None]
            chains = [one for each in kept for one in await store.chain(each.id, "") or ()]
            assert len(kept) == len(store)
            assert set(store._tokens._holders) == expected_tokens(chains)
            assert len(store._entries) >= len({id(one) for one in chains})
        clock.now += 11
        assert await store.get("resp_x", "") is None
        assert (len(store), store.bytes) == (0, 0)
        assert not store._sampled
        assert not store._sent

    asyncio.run(run())


@pytest.mark.asyncio
async def test_the_least_recently_used_go_first() -> None:
    one = stored("x")
    probe = MemoryStore()
    await probe.keep(one)
    store = MemoryStore(StateLimits(max_bytes=3 * probe.bytes))
    each = [stored("x") for _ in range(4)]
    for response in each[:3]:
        await store.keep(response)
    await store.get(each[0].id, "")
    await store.keep(each[3])
    assert [await store.get(response.id, "") is not None for response in each] == [True, False, True, True]


@pytest.mark.asyncio
async def test_a_conversation_costs_what_is_new_in_it() -> None:
    store = MemoryStore()
    turn = stored("x", new_tokens=1000)
    await store.keep(turn)
    first = store.bytes
    for _ in range(9):
        turn = stored("x", previous=turn, new_tokens=1000)
        await store.keep(turn)
    assert store.bytes == 10 * first
    await store.aclose()
    assert store.bytes == 0


def test_a_long_chain_is_released_without_recursion() -> None:
    calls = [CallTokens([1], [2], [-0.5])]
    for _ in range(50_000):
        calls.append(CallTokens.extending(calls[-1], [1], [2], [-0.5]))
    ledger: ChainLedger[CallTokens] = ChainLedger(lambda call: call.parent, lambda call: call.own_tokens)
    assert len(ledger.hold(calls[-1])) == len(calls)
    assert ledger.hold(calls[10]) == []
    assert ledger.total == 2 * len(calls)
    assert len(ledger.release(calls[-1])) == len(calls) - 11
    assert ledger.total == 22
    assert len(ledger.release(calls[10])) == 11
    assert (ledger.total, len(ledger)) == (0, 0)
