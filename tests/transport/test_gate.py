"""The gate before a replica, and the circuit: whatever happens in whatever order."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.held import until

from gym_sdk.transport.breaker import Breaker, Circuit, CircuitState
from gym_sdk.transport.gate import Gate
from gym_sdk.transport.retry import Retry, RetryBudget

STEPS = st.lists(
    st.sampled_from(["enter", "leave", "cancel", "shrink", "grow", "pause", "away", "turn"]), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 4))
def test_no_step_loses_a_place_or_lets_too_many_in(steps: list[str], most: int) -> None:
    async def play() -> None:
        gate = Gate(most)
        tasks: list[asyncio.Task[bool]] = []

        async def enter() -> bool:
            return gate.try_enter() or await gate.enter()

        for step in steps:
            if step == "enter":
                tasks.append(asyncio.create_task(enter()))
            elif step == "cancel" and tasks:
                tasks[len(tasks) // 2].cancel()
            elif step == "leave" and gate.in_flight:
                gate.leave()
            elif step == "shrink":
                gate.shrink()
            elif step == "grow":
                gate.grow()
            elif step == "pause":
                gate.pause(0.0)
            elif step == "away":
                gate.turn_away()
            await asyncio.sleep(0)
            assert 0 <= gate.in_flight <= most
            assert 1 <= gate.limit <= most
        # in the end everybody gets through
        while gate.load or gate.is_paused:
            for _ in range(gate.in_flight):
                gate.leave()
            await asyncio.sleep(0.0005 if gate.is_paused else 0)
        assert all(task.done() for task in tasks)
        gate.close()

    asyncio.run(play())


@given(st.lists(st.sampled_from(["ok", "bad", "old", "probe"]), max_size=60), st.integers(1, 4))
def test_the_circuit_opens_after_so_many_failures_in_a_row_and_pauses_grow(
    events: list[str], failures: int
) -> None:
    circuit = Circuit(Breaker(failures=failures, probe_s=1.0, max_probe_s=8.0))
    in_row, was_open = 0, False
    for now, event in enumerate(events):
        if event == "ok":
            circuit.succeeded(circuit.round)
            in_row = 0
            was_open = was_open and circuit.state is CircuitState.OPEN
        elif event == "old":
            state = circuit.state
            assert not circuit.failed(circuit.round - 1, "old", float(now))
            assert circuit.state is state
        elif event == "bad" and circuit.state is not CircuitState.OPEN:
            in_row += 1
            assert circuit.failed(circuit.round, "bad", float(now)) is (in_row >= failures)
            in_row = 0 if in_row >= failures else in_row
        elif event == "probe" and circuit.state is CircuitState.OPEN:
            assert 0.5 <= circuit.next_pause_s() <= 8.0
            circuit.probe_succeeded()
            assert circuit.state.value == "half_open"
        assert (circuit.down_since is None) is (circuit.state is CircuitState.CLOSED)


def test_an_outage_lasts_until_a_call_succeeds() -> None:
    circuit = Circuit(Breaker(failures=1, probe_s=1.0, max_probe_s=8.0))
    pauses = []
    for now in range(6):
        assert circuit.failed(circuit.round, "bad", float(now))
        pauses.append(circuit.next_pause_s())
        circuit.probe_succeeded()
        assert circuit.down_since == 0.0  # being well for a probe is not being well
    assert pauses[4] >= 4.0
    assert circuit.opened == 1
    assert circuit.succeeded(circuit.round)
    assert circuit.down_since is None
    assert not circuit.succeeded(circuit.round)


@given(st.lists(st.booleans(), max_size=300))
def test_retries_are_at_most_the_reserve_and_a_share_of_the_calls(calls: list[bool]) -> None:
    budget = RetryBudget(Retry(budget=0.25, reserve=3.0))
    retries = 0
    for number, wants_retry in enumerate(calls, 1):
        budget.earn()
        retries += wants_retry and budget.take()
        assert retries <= 3 + 0.25 * number
        assert 0 <= budget.tokens <= 3.0


@pytest.mark.asyncio
async def test_the_gate_serves_in_order() -> None:
    gate, order = Gate(1), list[int]()
    assert gate.try_enter()

    async def enter(number: int) -> None:
        assert await gate.enter()
        order.append(number)
        gate.leave()

    async with asyncio.TaskGroup() as tasks:
        for number in range(10):
            tasks.create_task(enter(number))
        await until(lambda: gate.waiting == 10)
        assert not gate.try_enter()
        gate.leave()
    assert order == list(range(10))
