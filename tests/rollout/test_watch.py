"""Warnings of what goes wrong in silence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.scripted import ScriptedTransport, call, say

from gym_sdk import GymClient, Limits, Task, tool
from gym_sdk.rollout.watch import TokenWatch
from gym_sdk.schema import ModelCall, Response, ResponseRequest, Rollout, Timing
from gym_sdk.tokens import CallTokens


def rollout(**metrics: float) -> Rollout:
    made = Rollout(id="r", task=Task("q", id="t"), timing=Timing(started_at=0.0), metrics=metrics)
    made.model_calls.append(ModelCall(response_id="x", first_item=0, end_item=0))
    return made


def test_tools_that_nobody_calls_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = TokenWatch(patience=3)
    for order in range(5):
        watch.add(rollout(tools_offered=2.0, tool_calls=0.0), order=order)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 rollouts had tools on offer and none was called" in record.getMessage()


def test_a_single_call_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    watch = TokenWatch(patience=3)
    watch.add(rollout(tools_offered=2.0, tool_calls=1.0), order=5)
    for order in range(5):
        watch.add(rollout(tools_offered=2.0, tool_calls=0.0), order=order)
    assert caplog.records == []


def test_who_calls_a_tool_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    watch = TokenWatch(patience=3)
    for order in (0, 2, 3, 4, 5, 6):  # whoever calls no tool is done sooner
        watch.add(rollout(tools_offered=2.0, tool_calls=0.0), order=order)
    assert caplog.records == []
    watch.add(rollout(tools_offered=2.0, tool_calls=0.0), order=1)
    assert len(caplog.records) == 1


def test_rollouts_without_tools_or_calls_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    watch = TokenWatch(patience=1)
    watch.add(rollout(tools_offered=0.0), order=0)
    failed = rollout(tools_offered=2.0)
    failed.model_calls.clear()
    watch.add(failed, order=1)
    assert caplog.records == []


def test_markup_and_drift_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    watch = TokenWatch()
    watch.add(rollout(unparsed_calls=2.0, forks=1.0, unreported_forks=1.0, lost_states=1.0), order=0)
    watch.add(rollout(unparsed_calls=6.0), order=1)
    watch.add(rollout(unparsed_calls=1.0), order=2)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["a", "most"]
    assert watch.metrics() == {"forks": 1, "unreported_forks": 1, "unparsed_calls": 9, "lost_states": 1}


def test_a_few_calls_that_do_not_parse_are_a_policys_own(caplog: pytest.LogCaptureFixture) -> None:
    watch = TokenWatch()
    for order in range(100):
        watch.add(rollout(unparsed_calls=1.0, tool_calls=3.0), order=order)
    assert caplog.records == []


@tool
def noop(x: int) -> int:
    """Return it."""
    return x


def drifting(tokens: list[CallTokens], fork: str | None) -> Any:
    """Answer with a call, then with text, carrying these tokens."""
    answers = iter([call(("noop", '{"x": 1}')), say("done")])
    calls = iter(tokens)

    def script(_: ResponseRequest) -> Response:
        response = next(answers)
        response.output[-1] = response.output[-1].with_tokens(next(calls))
        if response.output_text:
            response.fork = fork
        return response

    return script


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("second", "fork", "counts"),
    [
        ([1, 2, 3, 4], None, (0, 0)),
        ([1, 9, 9, 4], "edited", (1, 0)),
        ([1, 9, 9, 4], None, (0, 1)),
    ],
    ids=["extends", "reported", "silent"],
)
async def test_a_run_counts_reported_and_silent_forks(
    second: list[int], fork: str | None, counts: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = [CallTokens([1, 2], [3], [-0.5]), CallTokens(second, [5], [-0.5])]
    transport = ScriptedTransport(drifting(tokens, fork))
    async with (
        GymClient.over(transport) as client,
        client.rollouts([Task("q")], tools=[noop], limits=Limits(max_turns=3)) as stream,
    ):
        groups = [group async for group in stream]
    (done,) = groups[0].rollouts
    metrics = stream.watch.metrics()
    assert (metrics["forks"], metrics["unreported_forks"]) == counts
    assert len(done.sequences()) == (1 if counts == (0, 0) else 2)
    report = done.token_report()
    assert report.unreported_forks == counts[1]
    assert len(report.forks) == sum(counts)
    assert bool(caplog.records) == bool(counts[1])


@pytest.mark.asyncio
async def test_a_collection_sums_them_up() -> None:
    tokens = [CallTokens([1, 2], [3], [-0.5]), CallTokens([1, 9], [5], [-0.5])]
    async with GymClient.over(ScriptedTransport(drifting(tokens, "edited"))) as client:
        found = await client.collect([Task("q")], tools=[noop])
    assert found.summary()["forks"] == 1
    assert found.summary()["unreported_forks"] == 0
