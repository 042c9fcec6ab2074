"""Going on: from a store, and from rollouts that were cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.by_hand import ByHand
from support.held import until
from support.scripted import ScriptedTransport, call, respond, say

from gym_sdk import GymClient, Limits, Outcome, Rollout, Sampling, Task, tool
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.rollout import DynamicSampling, Schedule, read_rollouts
from gym_sdk.schema import Cancellation, FunctionCall, RolloutKey, Truncation
from gym_sdk.store import Journal
from gym_sdk.tokens import CallTokens

pytestmark = pytest.mark.asyncio


def tasks(count: int, say_more: str = "") -> list[Task]:
    return [Task(f"q{n}{say_more}", id=f"q{n}") for n in range(count)]


def by_seed(request: Any) -> Any:
    return say(str(request.seed % 97))


async def parity(rollout: Rollout) -> float:
    return float(int(rollout.output_text) % 2)


def essence(rollout: Rollout) -> Any:
    return (rollout.key, rollout.outcome, rollout.output_text, rollout.reward)


async def test_what_is_stored_is_not_sampled_again_and_delivered_as_if_it_had_been(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    transport = ScriptedTransport(by_seed)
    options: dict[str, Any] = {"group_size": 3, "verifier": parity, "sampling": Sampling(seed=5)}
    async with GymClient.over(transport) as client:
        whole = await client.collect(tasks(6), **options)
        asked = len(transport.requests)
        async with client.rollouts(tasks(6), store=store, limits=Limits(concurrency=2), **options) as stream:
            await anext(stream)
        stored = len(list(read_rollouts(store)))
        assert 3 <= stored < 18
        asked_first = len(transport.requests) - asked
        resumed = await client.collect(tasks(6), store=store, **options)
        assert len(transport.requests) - asked - asked_first == 18 - stored
        again = await client.collect(tasks(6), store=store, **options)
        assert len(transport.requests) - asked - asked_first == 18 - stored
    for collection in (resumed, again):
        assert [essence(r) for g in collection.groups for r in g.rollouts] == [
            essence(r) for g in whole.groups for r in g.rollouts
        ]
    assert len({rollout.key for rollout in read_rollouts(store)}) == 18
    assert resumed.summary()["mean_reward"] == whole.summary()["mean_reward"]


@given(
    stops=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    group_size=st.integers(1, 3),
    epochs=st.integers(1, 2),
    spare=st.integers(0, 1),
)
@settings(deadline=None, max_examples=25)
async def test_however_often_a_run_ends_each_key_is_delivered_as_in_one_run(
    stops: list[int], group_size: int, epochs: int, spare: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.mktemp("resume") / "r.jsonl"
    options: dict[str, Any] = {
        "group_size": group_size,
        "verifier": parity,
        "sampling": Sampling(seed=5),
        "schedule": Schedule(epochs=epochs),
        "dynamic": DynamicSampling(spare=spare),
        "limits": Limits(concurrency=3),
    }
    async with GymClient.over(ScriptedTransport(by_seed)) as client:
        for stop in stops:
            async with client.rollouts(tasks(3), store=store, **options) as stream:
                for _ in range(stop):
                    if await anext(stream, None) is None:
                        break
        resumed = await client.collect(tasks(3), store=store, **options)
        whole = await client.collect(tasks(3), **options)
    answers = {r.key: r.output_text for g in whole.groups for r in g.rollouts}
    assert [(g.epoch, g.task.id) for g in resumed.groups] == [(g.epoch, g.task.id) for g in whole.groups]
    for group in resumed.groups:
        assert len(group.rollouts) == group_size
        for rollout in group.rollouts:
            assert rollout.output_text == answers.get(rollout.key, rollout.output_text)
    lines = [rollout.key for rollout in read_rollouts(store)]
    assert len(lines) == len(set(lines))


async def test_what_failed_is_attempted_again(tmp_path: Path) -> None:
    store, fails = tmp_path / "r.jsonl", True

    def script(request: Any) -> Any:
        return PolicyError("no") if fails else say("1")

    transport = ScriptedTransport(script)
    async with GymClient.over(transport) as client:
        await client.collect(tasks(2), store=store)
        fails = False
        collection = await client.collect(tasks(2), store=store)
    assert [group.rollouts[0].outcome for group in collection.groups] == [Outcome.COMPLETED] * 2
    assert len(transport.requests) == 4


async def test_another_task_under_the_same_id_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    async with GymClient.over(ScriptedTransport(lambda request: say("x"))) as client:
        await client.collect(tasks(1), store=store)
        with pytest.raises(ConfigurationError, match="another task under the id 'q0'"):
            await client.collect(tasks(1, " changed"), store=store)


async def test_a_refill_is_restored_as_well(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    transport = ScriptedTransport(lambda request: say("1"))
    dynamic = DynamicSampling(refill=2)
    async with GymClient.over(transport) as client:
        first = await client.collect(tasks(2), group_size=2, verifier=parity, dynamic=dynamic, store=store)
        second = await client.collect(tasks(2), group_size=2, verifier=parity, dynamic=dynamic, store=store)
    assert len(transport.requests) == 8
    assert [g.rollouts for g in second.groups] == [g.rollouts for g in first.groups]


# attempts that were cancelled


@tool
async def look() -> str:
    """Look."""
    return "seen"


def calls_look() -> Any:
    item = FunctionCall(call_id="call_look", name="look", arguments="{}")
    return respond([item.with_tokens(CallTokens([1, 2], [3, 4], [-0.5, -0.25]))], tokens=False)


async def a_partial(client: GymClient, hand: ByHand, **options: Any) -> list[Rollout]:
    """Leave a stream whose only rollout has taken a turn, and waits for the second."""
    before = len(hand.calls)
    async with client.rollouts(
        tasks(1), tools=[look], sampling=Sampling(seed=1), keep_partial=True, **options
    ) as stream:
        (await hand.arrived(before + 1))[before].answer(calls_look())
        await hand.arrived(before + 2)
    return stream.partial


async def test_a_second_stream_goes_on_from_what_was_cancelled(tmp_path: Path) -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        (partial,) = await a_partial(client, hand)
        assert partial.outcome is Outcome.CANCELLED
        assert partial.cancellation is Cancellation.CALLER
        assert len(partial.model_calls) == 1
        assert hand.calls[1].cancelled

        async with client.rollouts(
            tasks(1), tools=[look], sampling=Sampling(seed=1), begun=[partial]
        ) as stream:
            (await hand.arrived(3))[2].answer("done")
            rollout = (await anext(stream)).rollouts[0]
    request, cut_off = hand.calls[2].request, hand.calls[1].request
    assert request.seed == cut_off.seed  # the second turn's
    assert [item.type for item in request.input] == ["message", "function_call", "function_call_output"]
    assert request.input[1].tokens.generation_token_ids == [3, 4]
    assert request.input[1].tokens.generation_log_probs == [-0.5, -0.25]
    assert rollout.outcome is Outcome.COMPLETED
    assert rollout.cancellation is None
    assert len(rollout.model_calls) == 2
    assert rollout.metrics["turns"] == 2.0
    assert partial.outcome is Outcome.CANCELLED  # the attempt itself is as it was


async def test_through_the_store(tmp_path: Path) -> None:
    store = tmp_path / "r.jsonl"
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        await a_partial(client, hand, store=store)
    assert [rollout.outcome for rollout in read_rollouts(store)] == [Outcome.CANCELLED]
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(1), tools=[look], store=store) as stream:
            (await hand.arrived(1))[0].answer("done")
            rollout = (await anext(stream)).rollouts[0]
    assert hand.calls[0].request.input[1].tokens.generation_token_ids == [3, 4]
    assert rollout.outcome is Outcome.COMPLETED
    with Journal(store) as journal:
        assert journal.outcome(RolloutKey("q0", 0, 0)) is Outcome.COMPLETED


async def test_a_tool_call_without_output_is_run_then() -> None:
    begun, runs = asyncio.Event(), 0

    @tool
    async def slow() -> str:
        """Look, slowly the first time."""
        nonlocal runs
        runs += 1
        if runs == 1:
            begun.set()
            await asyncio.sleep(60)
        return "seen"

    def script(request: Any) -> Any:
        asked = any(item.type == "function_call_output" for item in request.input)
        return say("x") if asked else call(("slow", "{}"))

    async with GymClient.over(ScriptedTransport(script)) as client:
        async with client.rollouts(tasks(1), tools=[slow], keep_partial=True) as stream:
            await begun.wait()
        (partial,) = stream.partial
        assert partial.items[-1].type == "function_call"
        rollout = await client.rollout(partial.task, tools=[slow], begun=partial)
    assert runs == 2
    assert [item.type for item in rollout.items][-2:] == ["function_call_output", "message"]


async def test_what_nobody_got_to_is_kept_for_the_next_stream() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        (partial,) = await a_partial(client, hand)
        for _ in range(2):
            async with client.rollouts(tasks(1), tools=[look], begun=[partial], keep_partial=True) as stream:
                pass
            (partial,) = stream.partial
            assert len(partial.model_calls) == 1


async def test_partial_rollouts_are_dropped_unless_asked_for(tmp_path: Path) -> None:
    store, hand = tmp_path / "r.jsonl", ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(1), tools=[look], store=store) as stream:
            (await hand.arrived(1))[0].answer(calls_look())
            await hand.arrived(2)
    assert stream.partial == []
    assert list(read_rollouts(store)) == []


async def test_stragglers_and_those_without_a_turn_are_not_partial() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        async with client.rollouts(tasks(2), dynamic=DynamicSampling(spare=1), keep_partial=True) as stream:
            (await hand.arrived(4))[0].answer()
            await anext(stream)
            await until(lambda: hand.calls[1].cancelled)
    assert stream.partial == []


async def test_state_of_its_own_cannot_go_on(tmp_path: Path) -> None:
    hand, store = ByHand(), tmp_path / "r.jsonl"
    environment = Environment(tools=[look], setup=lambda task: "state")
    async with GymClient.over(ScriptedTransport(hand)) as client:
        (partial,) = await a_partial(client, hand)
        with pytest.raises(ConfigurationError, match="state"):
            client.rollouts(tasks(1), environment=environment, begun=[partial])
        with Journal(store) as journal:
            journal.write(partial)
        async with client.rollouts(
            tasks(1), environment=environment, store=store, keep_partial=True
        ) as stream:
            held = (await hand.arrived(3))[2]
            assert [item.type for item in held.request.input] == ["message"]
            held.answer("x")
            assert (await anext(stream)).rollouts[0].id != partial.id


async def test_what_cannot_go_on() -> None:
    hand = ByHand()
    async with GymClient.over(ScriptedTransport(hand)) as client:
        (partial,) = await a_partial(client, hand)
        with pytest.raises(ConfigurationError, match="begun has another task under the id 'q0'"):
            await client.collect(tasks(1, " changed"), begun=[partial])
        partial.outcome = Outcome.COMPLETED
        with pytest.raises(ConfigurationError, match="only a cancelled one can go on"):
            await client.collect(tasks(1), begun=[partial])


@pytest.mark.parametrize("status", ["completed", "incomplete"])
async def test_an_attempt_that_was_cut_off_in_its_verifier_is_only_verified(status: str) -> None:
    begun, times = asyncio.Event(), 0

    async def verify(rollout: Rollout) -> float:
        nonlocal times
        times += 1
        if times == 1:
            begun.set()
            await asyncio.sleep(60)
        return 1.0

    transport = ScriptedTransport(lambda request: say("x", status=status))
    options: dict[str, Any] = {"verifier": verify, "sampling": Sampling(max_output_tokens=1)}
    async with GymClient.over(transport) as client:
        async with client.rollouts(tasks(1), keep_partial=True, **options) as stream:
            await begun.wait()
        collection = await client.collect(tasks(1), begun=stream.partial, **options)
    rollout = collection.groups[0].rollouts[0]
    assert len(transport.requests) == 1
    assert rollout.reward == 1.0
    assert (rollout.outcome, rollout.truncation) == (
        (Outcome.COMPLETED, None) if status == "completed" else (Outcome.TRUNCATED, Truncation.TOKENS)
    )
