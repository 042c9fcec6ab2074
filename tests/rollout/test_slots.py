"""Places and paces, against simple models of them."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.rollout.slots import Slots

pytestmark = pytest.mark.asyncio


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


@given(
    limit=st.integers(1, 3),
    steps=st.lists(st.tuples(st.sampled_from(["come", "leave", "give up", "turn"]), st.integers(0, 9))),
)
@settings(deadline=None, max_examples=150)
async def test_places_go_to_the_smallest_order_and_none_is_lost(
    limit: int, steps: list[tuple[str, int]]
) -> None:
    slots = Slots(limit)
    holding: list[int] = []
    leave: dict[int, asyncio.Event] = {}
    tasks: dict[int, asyncio.Task[None]] = {}

    async def work(number: int, order: int) -> None:
        async with slots.claim(order):
            holding.append(number)
            try:
                await leave[number].wait()
            finally:
                holding.remove(number)

    waiting: list[tuple[int, int]] = []  # order, number
    for number, (step, value) in enumerate(steps):
        if step == "come":
            leave[number] = asyncio.Event()
            tasks[number] = asyncio.create_task(work(number, value))
            waiting.append((value, number))
        elif step == "leave" and holding:
            leave[holding[value % len(holding)]].set()
        elif step == "give up" and waiting:
            tasks[waiting.pop(value % len(waiting))[1]].cancel()
        elif step == "turn":
            await asyncio.sleep(0)
            continue
        await settle()
        waiting = [entry for entry in waiting if entry[1] not in holding and not tasks[entry[1]].done()]
        assert len(holding) <= limit
        assert slots.used == len(holding)
        assert slots.waiting == len(waiting)
        assert not waiting or len(holding) == limit
    for event in leave.values():
        event.set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert slots.used == 0


async def test_who_waits_is_served_by_order() -> None:
    slots = Slots(1)
    served: list[int] = []
    await slots.acquire(0)

    async def work(order: int) -> None:
        async with slots.claim(order):
            served.append(order)

    tasks = [asyncio.create_task(work(order)) for order in (5, 1, 3, 1)]
    await settle()
    slots.release()
    await asyncio.gather(*tasks)
    assert served == [1, 1, 3, 5]


async def test_a_place_that_is_given_to_what_was_just_cancelled_goes_on() -> None:
    slots = Slots(1)
    await slots.acquire(0)
    first = asyncio.create_task(slots.acquire(1))
    second = asyncio.create_task(slots.acquire(2))
    await settle()
    slots.release()  # it is first's now, and first has not run yet
    first.cancel()
    await second
    assert slots.used == 1
    with pytest.raises(asyncio.CancelledError):
        await first
