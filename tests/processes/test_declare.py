"""`in_process` on tools and verifiers, and what cannot be declared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import worker_functions
from support.scripted import ScriptedTransport, call, in_turn, say
from support.worker_functions import add, is_right, who

from gym_sdk import GymClient, Outcome, Task
from gym_sdk.calling import is_async
from gym_sdk.errors import ConfigurationError, ToolError, VerifierError
from gym_sdk.processes import in_process, pool_of
from gym_sdk.schema import Message, ModelCall, Rollout, Timing
from gym_sdk.tokens import CallTokens
from gym_sdk.tools import ToolContext
from gym_sdk.verifiers import run_verifier


def rollout(text: str, *, calls: int = 1) -> Rollout:
    tokens = [CallTokens([1, 2], [3], [-0.5])]
    for _ in range(calls - 1):
        tokens.append(CallTokens.extending(tokens[-1], [4], [5], [-0.25]))
    return Rollout(
        id="r1",
        task=Task("question", answer="42", id="t1", metadata={"pair": (1, 2)}),
        items=[Message(role="user", content="question"), Message(role="assistant", content=text)],
        input_items=1,
        model_calls=[ModelCall(response_id="r", first_item=1, end_item=2, tokens=entry) for entry in tokens],
        timing=Timing(started_at=0.0),
    )


@pytest.mark.asyncio
async def test_a_tool_in_a_process() -> None:
    assert add.name == "add"
    assert add.description == "Add."
    properties = add.schema.parameters["properties"]  # type: ignore[index]
    assert properties["a"] == {"type": "integer", "description": "the first number."}
    text = await add.run('{"a": 1}')
    assert text.startswith("11 in ")
    assert text != f"11 in {os.getpid()}"
    with pytest.raises(ToolError, match=r"^add failed: the worker process ended with code 1$"):
        await add.run('{"a": 13}')
    assert (await add.run('{"a": 2, "b": 3}')).startswith("5 in ")
    assert await add(3, b=4) in {f"7 in {pid}" for pid in pool_of(add).pids}
    assert await who.run('{"suffix": "!"}', ToolContext(Task("q"), "r1")) == "q!"
    with pytest.raises(ToolError, match=r"^who failed: the arguments of who cannot be sent to a process"):
        await who.run("", ToolContext(Task("q"), "r1", state=lambda: 0))


@pytest.mark.asyncio
async def test_a_verifier_in_a_process_gets_the_rollout_with_its_tokens() -> None:
    assert is_async(is_right)
    for text, value in (("42", 1.0), ("43", 0.0)):
        assert (await run_verifier(is_right, rollout(text, calls=2_000))).value == value
    sent = rollout("42", calls=3)
    (back,), _ = await in_process(worker_functions.echo)(sent)
    assert back == sent
    assert [entry.tokens for entry in back.model_calls] == [entry.tokens for entry in sent.model_calls]
    assert back.task.metadata == {"pair": (1, 2)}
    with pytest.raises(VerifierError, match="is_right returned str 'good'"):
        await run_verifier(is_right, rollout("nonsense"))


@pytest.mark.asyncio
async def test_in_a_rollout() -> None:
    transport = ScriptedTransport(
        in_turn(call(("add", '{"a": 40, "b": 2}')), call(("add", '{"a": 13}')), say("42"))
    )
    async with GymClient.over(transport) as client:
        done = await client.rollout(Task("q", answer="42"), tools=[add], verifier=is_right)
    assert done.outcome is Outcome.COMPLETED
    assert done.reward == 1.0
    assert done.metrics["tool_errors"] == 1


async def coroutine_function() -> None: ...


class Callable_:
    def __call__(self) -> None: ...

    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 0, "is a lambda or a function inside another one"),
        (coroutine_function, "is a coroutine function, which runs on the event loop"),
        (Callable_(), "needs a function at the top level of a module"),
        (Callable_().method, "needs a function at the top level of a module"),
    ],
)
def test_what_a_worker_could_not_import(function: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        in_process(function)


def test_limits_are_checked_at_once() -> None:
    with pytest.raises(ConfigurationError, match="timeout_s of a function in a process must be positive"):
        in_process(timeout_s=0)


@pytest.mark.asyncio
async def test_a_name_that_leads_to_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = in_process(worker_functions.pid)
    monkeypatch.setattr(worker_functions, "pid", worker_functions.echo)
    with pytest.raises(ConfigurationError, match=r"support\.worker_functions:pid is another function now"):
        await declared()
    monkeypatch.delattr(worker_functions, "pid")
    with pytest.raises(ConfigurationError, match=r"support\.worker_functions:pid cannot be imported"):
        await declared()


def test_only_declared_functions_have_processes() -> None:
    with pytest.raises(ConfigurationError, match="does not run in processes: declare it with in_process"):
        pool_of(worker_functions.echo)


def test_a_function_of_the_script_itself_says_where_to_put_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gym_sdk.processes import in_process\n@in_process\ndef check(rollout): return 1.0\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "in_process: check is defined in a notebook, a script or the interpreter" in done.stderr
    assert "%%writefile my_tools.py" in done.stderr
