"""Answers that arrive together are handed over in portions, in the order of coming."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gym_sdk.transport.pacing import Pacer

pytestmark = pytest.mark.asyncio


@given(per_turn=st.integers(1, 5), count=st.integers(0, 30), cancelled=st.sets(st.integers(0, 29)))
@settings(deadline=None, max_examples=60)
async def test_so_many_in_a_turn_in_the_order_of_coming(
    per_turn: int, count: int, cancelled: set[int]
) -> None:
    pacer = Pacer(per_turn)
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(count)]
    handed: list[int] = []
    for number, future in enumerate(futures):
        future.add_done_callback(lambda done: handed.append(done.result()) if not done.cancelled() else None)
        pacer.hand(future, number)
    for number in cancelled:
        if number < count:
            futures[number].cancel()
    before = 0
    while not all(future.done() for future in futures):
        await asyncio.sleep(0)
        assert len(handed) - before <= 2 * per_turn  # those of this turn, and those of the last
        before = len(handed)
    await asyncio.sleep(0)
    assert handed == sorted(handed)
    assert set(range(count)) - set(handed) <= cancelled


async def test_an_idle_pacer_leaves_the_loop_alone() -> None:
    pacer = Pacer(2)
    loop: Any = asyncio.get_running_loop()
    future = loop.create_future()
    pacer.hand(future, 1)
    assert future.done()
    for _ in range(4):
        await asyncio.sleep(0)
    assert not pacer._scheduled
    assert not loop._ready
