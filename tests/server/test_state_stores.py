"""What both stores do alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import pytest_asyncio
from support.stored import asked, stored

from backends.ids import new_id
from backends.server.state import MemoryStore, ResponseStore, SqliteStore, StateLimits, StoredResponse
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import TOKEN_FORMS, CustomToolCall, FunctionCall, Reasoning, TextPart

pytestmark = pytest.mark.asyncio

Make: TypeAlias = Callable[..., ResponseStore]


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def make(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Make]:
    made: list[ResponseStore] = []

    def start(**limits: float) -> ResponseStore:
        if request.param == "memory":
            made.append(MemoryStore(StateLimits(**limits), clock=clock))  # type: ignore[arg-type]
        else:
            made.append(SqliteStore(tmp_path / "kept.db", StateLimits(**limits), clock=clock))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for store in made:
        await store.aclose()


def same(one: StoredResponse | None, other: StoredResponse) -> bool:
    assert one is not None
    forms = [one.response.in_form(form) == other.response.in_form(form) for form in TOKEN_FORMS]
    asked_alike = [item.to_wire() for item in one.input] == [item.to_wire() for item in other.input]
    return all(forms) and asked_alike and (one.scope, one.size) == (other.scope, other.size)


async def test_what_is_kept_comes_back_in_every_form(make: Make) -> None:
    store = make()
    first = stored("one")
    second = stored("two", previous=first)
    third = stored("three", previous=second, shares=False)
    for each in (first, second, third):
        await store.keep(each)
    for each in (third, first, second):
        assert same(await store.get(each.id, ""), each)
    chain = await store.chain(third.id, "")
    assert chain is not None
    assert len(chain) == 3
    assert all(same(*pair) for pair in zip(chain, (first, second, third), strict=True))
    assert await store.get("resp_x", "") is None
    assert await store.chain("resp_x", "") is None
    assert await store.item("msg_x", "") is None
    assert not await store.delete("resp_x", "")


async def test_a_rollouts_responses_are_found_in_it_alone(make: Make) -> None:
    store = make()
    own = stored("own", scope="r1", response_id="resp_1")
    other = stored("other", scope="r2", response_id="resp_1")
    for each in (own, other):
        await store.keep(each)
    assert same(await store.get("resp_1", "r1"), own)
    assert same(await store.get("resp_1", "r2"), other)
    assert await store.get("resp_1", "") is None
    message = own.response.output[0].id
    assert await store.item(message, "r1") is not None
    assert await store.item(message, "r2") is None
    assert not await store.delete("resp_1", "")
    assert await store.delete("resp_1", "r1")
    assert same(await store.get("resp_1", "r2"), other)


async def test_a_response_takes_the_place_of_itself(make: Make) -> None:
    store = make()
    first = stored("one")
    await store.keep(first)
    begun = stored("two", previous=first, status="queued", response_id="resp_2")
    await store.keep(begun)
    assert same(await store.get("resp_2", ""), begun)
    assert await store.delete(first.id, "")
    done = stored("two", previous=first, response_id="resp_2")
    await store.keep(done)
    assert same(await store.get("resp_2", ""), done)
    chain = await store.chain("resp_2", "")
    assert chain is not None
    assert same(chain[0], first)
    item = await store.item(done.response.output[0].id, "")
    assert item is not None
    assert item.tokens == done.response.tokens


async def test_items_are_found_sampled_ones_first(make: Make) -> None:
    store = make()
    first = stored("one")
    sampled = first.response.output[0]
    await store.keep(first)
    echo = StoredResponse.of(
        stored("two").response, [asked("mine", "msg_mine"), sampled.model_copy(update={"status": None})]
    )
    await store.keep(echo)
    found = await store.item(sampled.id, "")
    assert found is not None
    assert found.tokens == first.response.tokens
    mine = await store.item("msg_mine", "")
    assert mine is not None
    assert mine.to_wire() == echo.input[0].to_wire()
    assert await store.delete(first.id, "")
    again = await store.item(sampled.id, "")  # the echo is kept still
    assert again is not None
    assert again.tokens is None
    assert await store.delete(echo.id, "")
    assert await store.item(sampled.id, "") is None
    assert await store.item("msg_mine", "") is None


async def test_what_a_kept_response_continues_stays_with_it(make: Make) -> None:
    store = make()
    chain = [stored("0")]
    for number in range(1, 6):
        chain.append(stored(str(number), previous=chain[-1]))
    for each in chain:
        await store.keep(each)
    for each in chain[:-1]:
        assert await store.delete(each.id, "")
        assert await store.get(each.id, "") is None
        assert not await store.delete(each.id, "")
    kept = await store.chain(chain[-1].id, "")
    assert kept is not None
    assert all(same(*pair) for pair in zip(kept, chain, strict=True))
    assert same(await store.get(chain[-1].id, ""), chain[-1])
    assert await store.delete(chain[-1].id, "")
    assert await store.chain(chain[-1].id, "") is None


async def test_the_oldest_go_when_there_are_too_many(make: Make) -> None:
    store = make(max_responses=3)
    each = [stored(str(number)) for number in range(5)]
    for one in each:
        await store.keep(one)
    assert [await store.get(one.id, "") is not None for one in each] == [False, False, True, True, True]


async def test_a_response_has_its_time(make: Make, clock: Clock) -> None:
    store = make(ttl_s=100)
    first, second = stored("one"), stored("two")
    await store.keep(first)
    clock.now += 60
    await store.keep(second)
    clock.now += 60
    message = first.response.output[0].id
    assert await store.item(message, "") is None
    assert await store.get(first.id, "") is None
    assert await store.chain(first.id, "") is None
    assert not await store.delete(first.id, "")
    assert same(await store.get(second.id, ""), second)
    await store.keep(first)
    assert same(await store.get(first.id, ""), first)
    assert await store.item(message, "") is not None


async def test_a_chain_that_began_elsewhere_says_so(make: Make) -> None:
    store = make()
    elsewhere = stored("one")
    here = stored("two", previous=elsewhere)
    await store.keep(here)
    chain = await store.chain(here.id, "")
    assert chain is not None
    assert [one.id for one in chain] == [here.id]
    assert chain[0].response.tokens == here.response.tokens


async def test_all_kinds_of_items_come_back(make: Make) -> None:
    store = make()
    kept = stored("one")
    kept.response.output[:0] = [
        Reasoning(id=new_id("rs"), content=[TextPart(text="hm")], encrypted_content="x"),
        FunctionCall(id=new_id("fc"), call_id="c", name="f", arguments="{}"),
        CustomToolCall(id=new_id("ctc"), call_id="d", name="g", input="free"),
    ]
    await store.keep(kept)
    assert same(await store.get(kept.id, ""), kept)


@pytest.mark.parametrize("name", StateLimits.__slots__)
async def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        StateLimits(**{name: 0})
