"""One rollout: turns, tools, limits, deadlines; every failure is an outcome."""

from __future__ import annotations

import threading
import time
from typing import Any

import anyio
import pytest
from support.scripted import ScriptedTransport, call, in_turn, respond, say

from gym_sdk import Deadlines, GymClient, Limits, Outcome, Retry, Rollout, Sampling, Task, tool
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError, ContextOverflowError, PolicyError, TransportError
from gym_sdk.schema import FunctionCallOutput, Message, Reasoning, Truncation

pytestmark = pytest.mark.asyncio

QUICK = Retry(attempts=3, base_s=0.001, max_s=0.01)


@tool
async def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


async def correct(rollout: Rollout) -> float:
    return float(str(rollout.task.answer) in rollout.output_text)


async def attempt(script: Any, task: Task | str = "q", **options: Any) -> tuple[Rollout, ScriptedTransport]:
    transport = ScriptedTransport(script)
    async with GymClient.over(transport, model="policy", retry=QUICK) as client:
        rollout = await client.rollout(task, **options)
    assert transport.closed
    return rollout, transport


def outputs(rollout: Rollout) -> list[str]:
    return [item.text for item in rollout.items if isinstance(item, FunctionCallOutput)]


async def test_calls_and_answers_alternate_until_there_is_no_call() -> None:
    script = in_turn(call(("add", '{"a": 2, "b": 3}')), say("It is 5."))
    rollout, transport = await attempt(
        script, Task("What is 2 + 3?", answer="5"), tools=[add], verifier=correct, sampling=Sampling(seed=1)
    )
    assert rollout.outcome is Outcome.COMPLETED
    assert rollout.reward == 1.0
    assert rollout.output_text == "It is 5."
    assert outputs(rollout) == ["5"]
    assert [item.type for item in rollout.items] == [
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    assert all(item.tokens is None for item in rollout.items)
    second = transport.requests[1].input
    assert isinstance(second, list)
    assert second[1].tokens == rollout.model_calls[0].tokens
    assert rollout.metrics["tool_calls"] == 1
    assert rollout.timing.duration_s > 0
    seeds = [request.seed for request in transport.requests]
    assert len(set(seeds)) == 2


async def test_parallel_calls_run_concurrently_and_keep_their_order() -> None:
    arrived = anyio.Event()

    @tool
    async def first() -> str:
        with anyio.fail_after(5):
            await arrived.wait()
        return "one"

    @tool
    async def second() -> str:
        arrived.set()
        return "two"

    script = in_turn(call(("first", ""), ("second", "{}")), say("done"))
    rollout, _ = await attempt(script, tools=[first, second])
    assert outputs(rollout) == ["one", "two"]


async def test_tool_failures_go_back_to_the_model() -> None:
    @tool
    async def boom() -> str:
        raise ValueError("no such city")

    @tool
    async def hang() -> str:
        await anyio.sleep_forever()
        return ""

    @tool(timeout_s=0.02)
    def block() -> str:
        time.sleep(0.5)
        return ""

    script = in_turn(
        call(
            ("nope", "{}"),
            ("add", "{oops"),
            ("add", "[1]"),
            ("add", '{"a": "x", "b": 1}'),
            ("boom", "{}"),
            ("hang", "{}"),
            ("block", ""),
        ),
        say("sorry"),
    )
    rollout, _ = await attempt(
        script, tools=[add, boom, hang, block], deadlines=Deadlines(tool_s=0.05), verifier=lambda rollout: 0.5
    )
    texts = outputs(rollout)
    assert rollout.outcome is Outcome.COMPLETED
    assert rollout.reward == 0.5
    assert rollout.metrics["tool_errors"] == 7
    assert all(text.startswith("Error: ") for text in texts)
    assert "no tool 'nope'" in texts[0]
    assert "add" in texts[0]
    assert "a" in texts[3]
    assert "no such city" in texts[4]
    assert "did not finish within 0.05 s" in texts[5]
    assert "did not finish within 0.02 s" in texts[6]


@pytest.mark.parametrize(
    ("error", "tries", "name"),
    [
        (TransportError("down", retryable=True, status=503), 3, "TransportError"),
        (TransportError("garbled", retryable=False), 1, "TransportError"),
        (PolicyError("bad tool", param="tools"), 1, "PolicyError"),
        (RuntimeError("bug"), 1, "RuntimeError"),
        (ContextOverflowError("too long"), 1, "ContextOverflowError"),
    ],
)
async def test_a_failed_model_call_fails_the_rollout_without_a_reward(
    error: Exception, tries: int, name: str
) -> None:
    rollout, transport = await attempt(lambda request: error, verifier=correct)
    assert rollout.outcome is Outcome.FAILED
    assert rollout.reward is None
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.where) == (name, "model_call")
    assert len(transport.requests) >= tries
    assert tries > 1 or len(transport.requests) == 1


async def test_a_retry_that_succeeds_is_counted() -> None:
    script = in_turn(
        TransportError("busy", retryable=True, status=429, retry_after_s=0.001),
        respond([Message(role="assistant", content="")], status="cancelled"),
        say("ok"),
    )
    rollout, _ = await attempt(script)
    assert rollout.outcome is Outcome.COMPLETED
    assert [call.retries for call in rollout.model_calls] == [2]


async def test_what_was_collected_before_a_failure_is_kept() -> None:
    script = in_turn(call(("add", '{"a": 1, "b": 1}')), TransportError("gone", retryable=False))
    rollout, _ = await attempt(script, tools=[add], verifier=correct)
    assert rollout.outcome is Outcome.FAILED
    assert outputs(rollout) == ["2"]
    assert len(rollout.model_calls) == 1


async def test_limits_truncate_and_the_verifier_still_decides() -> None:
    cut, _ = await attempt(
        in_turn(say("It is", status="incomplete")),
        verifier=lambda rollout: 0.25,
        sampling=Sampling(max_output_tokens=1),
    )
    assert (cut.outcome, cut.truncation, cut.reward) == (Outcome.TRUNCATED, Truncation.TOKENS, 0.25)
    full, _ = await attempt(in_turn(say("It is", status="incomplete")))
    assert full.truncation is Truncation.CONTEXT
    overflow, _ = await attempt(
        in_turn(call(("add", '{"a": 1, "b": 1}')), ContextOverflowError("long")),
        tools=[add],
        verifier=lambda rollout: 0.0,
    )
    assert (overflow.truncation, overflow.reward) == (Truncation.CONTEXT, 0.0)
    endless, transport = await attempt(
        lambda request: call(("add", '{"a": 1, "b": 1}')), tools=[add], limits=Limits(max_turns=3)
    )
    assert endless.truncation is Truncation.TURNS
    assert len(transport.requests) == 3


async def test_deadlines_fail_and_name_what_was_waited_for() -> None:
    async def never(request: Any) -> Any:
        await anyio.sleep_forever()

    slow, _ = await attempt(never, deadlines=Deadlines(model_call_s=0.02))
    assert slow.failure is not None
    assert (slow.failure.error, slow.failure.where) == ("DeadlineError", "model_call")
    whole, _ = await attempt(never, deadlines=Deadlines(rollout_s=0.02))
    assert whole.failure is not None
    assert (
        "the rollout (Deadlines.rollout_s) did not finish within its deadline of 0.02 s"
        in whole.failure.message
    )

    async def hang(rollout: Rollout) -> float:
        await anyio.sleep_forever()
        return 1.0

    stuck, _ = await attempt(in_turn(say("x")), verifier=hang, deadlines=Deadlines(verifier_s=0.02))
    assert stuck.reward is None
    assert stuck.failure is not None
    assert (stuck.failure.error, stuck.failure.where) == ("DeadlineError", "verifier")


async def test_a_verifier_that_raises_gives_no_reward() -> None:
    def broken(rollout: Rollout) -> float:
        raise KeyError("answer")

    rollout, _ = await attempt(in_turn(say("x")), verifier=broken)
    assert rollout.outcome is Outcome.FAILED
    assert rollout.reward is None
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.where) == ("VerifierError", "verifier")
    assert rollout.output_text == "x"


async def test_a_blocking_verifier_does_not_stop_the_loop() -> None:
    main = threading.get_ident()
    seen: list[int] = []

    def blocking(rollout: Rollout) -> float:
        seen.append(threading.get_ident())
        time.sleep(0.05)
        return 1.0

    rollout, _ = await attempt(in_turn(say("x")), verifier=blocking)
    assert rollout.reward == 1.0
    assert seen != [main]


async def test_an_environment_gets_its_state_and_gives_it_back() -> None:
    log: list[str] = []

    class Counter:
        value = 0

        async def increment(self) -> int:
            """Count up."""
            self.value += 1
            return self.value

    async def setup(task: Task) -> Counter:
        log.append(f"setup {task.id}")
        return Counter()

    async def teardown(state: Counter) -> None:
        log.append(f"teardown {state.value}")

    environment = Environment(
        tools=lambda state: [tool(state.increment)], setup=setup, teardown=teardown, instructions="Count."
    )
    rollout, transport = await attempt(
        in_turn(call(("increment", "{}"), ("increment", "")), say("2")),
        Task("go", id="t1"),
        environment=environment,
    )
    assert rollout.outcome is Outcome.COMPLETED
    assert outputs(rollout) == ["1", "2"]
    assert log == ["setup t1", "teardown 2"]
    assert transport.requests[0].instructions == "Count."

    log.clear()
    await attempt(lambda request: PolicyError("no"), Task("go", id="t2"), environment=environment)
    assert log == ["setup t2", "teardown 0"]


async def test_a_failing_setup_is_a_failed_rollout() -> None:
    async def setup(task: Task) -> None:
        raise OSError("no sandbox")

    rollout, transport = await attempt(in_turn(), environment=Environment(setup=setup))
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.where) == ("OSError", "setup")
    assert not transport.requests


async def test_task_settings_win_over_the_call() -> None:
    task = Task("q", instructions="Be brief.", settings={"temperature": 0.0})
    _, transport = await attempt(in_turn(say("x")), task, sampling=Sampling(temperature=1.0, top_k=5))
    request = transport.requests[0]
    assert (request.temperature, request.top_k, request.instructions) == (0.0, 5, "Be brief.")


async def test_reasoning_items_are_sent_back() -> None:
    thought = Reasoning(id="rs_1", encrypted_content="opaque")
    script = in_turn(
        respond([thought, call(("add", '{"a": 1, "b": 2}')).output[0]]),
        say("3"),
    )
    _, transport = await attempt(script, tools=[add])
    second = transport.requests[1].input
    assert isinstance(second, list)
    assert second[1] == thought


async def test_misuse_is_a_configuration_error() -> None:
    client = GymClient.over(ScriptedTransport(in_turn()))
    with pytest.raises(ConfigurationError, match="not open"):
        await client.rollout("q")
    async with client:
        with pytest.raises(ConfigurationError, match="not both"):
            await client.rollout("q", tools=[add], environment=Environment())
        with pytest.raises(ConfigurationError, match="must be a Task or text"):
            await client.rollout(3)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="no item"):
            await client.rollout(Task([{"content": "x"}]))
        with pytest.raises(ConfigurationError, match="already"):
            await client.__aenter__()
    for bad in (lambda: Deadlines(tool_s=0), lambda: Limits(max_turns=0), lambda: Retry(attempts=0)):
        with pytest.raises(ConfigurationError):
            bad()
    with pytest.raises(ConfigurationError, match="base_url"):
        GymClient("localhost:8000")
