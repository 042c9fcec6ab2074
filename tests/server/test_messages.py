"""`POST /v1/messages`, asked by the anthropic package: what comes back, and that echoing it never forks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic, AsyncAnthropic, NotFoundError, beta_tool
from pydantic import BaseModel
from support.agents import call_text, say_text
from support.capturing import Serve
from support.claude import CALCULATOR, THINKS, ask, claude_agent
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.surfaces import MessagesSurface
from backends.server.surfaces.messages_answer import message_of
from backends.server.surfaces.messages_blocks import tool_input
from gym_sdk import GymClient, Outcome, Rollout, Task
from gym_sdk.schema import Reasoning

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "hi"}


def client_of(url: str, **options: Any) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0, **options)


async def test_blocks_come_in_the_order_in_which_they_were_sampled(serve: Serve) -> None:
    async with client_of(await serve([THINKS])) as client:
        message = await ask(client, stream=False, messages=[USER], tools=[CALCULATOR])
    thinking, text, use = message.content
    assert (thinking.type, text.type, use.type) == ("thinking", "text", "tool_use")
    assert thinking.thinking.strip() == "So."
    assert text.text.strip() == "Let me see."
    assert (use.name, use.input) == ("calculator", {"expression": "1 + 2"})
    assert message.id.startswith("msg_")
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "tool_use", None)
    tokens = message.model_extra
    assert tokens is not None
    assert message.usage.input_tokens == len(tokens["prompt_token_ids"])
    assert message.usage.output_tokens == len(tokens["generation_token_ids"])
    assert len(tokens["generation_log_probs"]) == message.usage.output_tokens
    assert "fork" not in tokens


@pytest.mark.parametrize("dumps", [False, True], ids=["objects", "dicts"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_captured_agent_is_one_sequence(serve: Serve, stream: bool, dumps: bool) -> None:
    says = [THINKS, "<think>\nAnd\n</think>\n\n" + call_text("3+4"), say_text("It is 7.")]
    async with GymClient(await serve(says), model="policy") as client:
        async with client.capture(Task("1 + 2 + 4?", id="sum")) as session:
            thinking = {"type": "enabled", "budget_tokens": 1024}
            said = await claude_agent(
                session.anthropic(),
                "1 + 2 + 4?",
                stream=stream,
                dumps=dumps,
                system="Add up.",
                thinking=thinking,
                max_tokens=2048,
            )
            rollout = await session.finish()
    assert said == "It is 7."
    assert {call.route for call in session.calls} == {"messages"}
    assert [call.fork for call in session.calls] == [None] * 3
    assert (rollout.outcome, rollout.failure) == (Outcome.COMPLETED, None)
    assert "forks" not in rollout.metrics
    assert rollout.metrics["tool_calls"] == 2
    (row,) = rollout.sequences()
    assert row.trained_tokens == sum(
        len(call.tokens.generation_token_ids) for call in rollout.model_calls if call.tokens
    )
    assert Rollout.model_validate_json(rollout.model_dump_json()) == rollout


async def test_a_real_policy_is_captured_without_a_fork(untrained_policy: Path) -> None:
    async with GymClient.local(untrained_policy) as client:
        async with client.capture(Task("1 + 2 =", id="real")) as session:
            anthropic = session.anthropic()
            history: list[Any] = []
            for turn in range(3):
                history.append({"role": "user", "content": f"turn {turn}"})
                message = await ask(
                    anthropic,
                    stream=turn == 1,
                    model=session.model,
                    max_tokens=12,
                    messages=history,
                    extra_body={"temperature": 1.0},  # the package has no argument for it any more
                )
                history.append({"role": "assistant", "content": message.content})
            rollout = await session.finish()
    assert [call.fork for call in session.calls] == [None] * 3
    assert rollout.token_report().forks == []
    assert len(rollout.sequences()) == 1


async def test_the_package_runs_its_tools(serve: Serve) -> None:
    @beta_tool
    def calculator(expression: str) -> str:
        """Evaluate an expression."""
        return str(sum(map(int, expression.split("+"))))

    url = await serve([call_text("20 + 22"), say_text("It is 42.")])

    def run() -> str:
        with Anthropic(base_url=url.removesuffix("/v1"), api_key="none") as client:
            runner = client.beta.messages.tool_runner(
                model="policy", max_tokens=99, tools=[calculator], messages=[USER], thread=False
            )
            return "".join(block.text for block in runner.until_done().content if block.type == "text")

    assert await asyncio.to_thread(run) == "It is 42."


async def test_the_package_parses_what_a_schema_holds(serve: Serve, renderer: TemplateRenderer) -> None:
    class Sum(BaseModel):
        total: int

    engine = ReplayEngine([renderer.encode('{"total": 3}<|im_end|>')])
    async with client_of(await serve(engine=engine)) as client:
        message = await client.messages.parse(
            model="policy", max_tokens=99, messages=[USER], output_format=Sum
        )
    assert message.parsed_output == Sum(total=3)


async def test_why_a_message_ended(serve: Serve) -> None:
    url = await serve(["and so", say_text("one, two, three"), say_text("done"), "cut"])
    async with client_of(url) as client:
        cut = await ask(client, stream=False, messages=[USER], max_tokens=2)
        stopped = await ask(client, stream=False, messages=[USER], stop_sequences=["two"])
        ended = await ask(client, stream=False, messages=[USER])
        full = await ask(client, stream=False, messages=[USER], max_tokens=9_000)
    assert cut.stop_reason == "max_tokens"
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")
    assert [block.text for block in stopped.content if block.type == "text"] == ["one, "]
    assert ended.stop_reason == "end_turn"
    assert full.stop_reason == "model_context_window_exceeded"


@pytest.mark.parametrize(
    "arguments", ["[1]", '"text"', '{"a": 1, "a": 2}', '{"a": 1e999}', "{'a': 1}", '{"a": NaN}']
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_call_that_no_object_can_carry_is_text_and_comes_back(
    serve: Serve, stream: bool, arguments: str
) -> None:
    assert tool_input(arguments) is None
    call = f'<tool_call>\n{{"name": "calculator", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    async with client_of(await serve([call, say_text("Sorry.")])) as client:
        history: list[Any] = [USER]
        message = await ask(client, stream=stream, messages=history, tools=[CALCULATOR])
        (block,) = message.content
        assert block.type == "text"
        assert message.stop_reason == "end_turn"
        history += [{"role": "assistant", "content": message.content}, USER]
        after = await ask(client, stream=stream, messages=history, tools=[CALCULATOR])
        assert "fork" not in (after.model_extra or {})
    assert [part.text for part in after.content if part.type == "text"] == ["Sorry."]


async def test_an_empty_answer_has_no_block(serve: Serve) -> None:
    async with client_of(await serve(["<|im_end|>", say_text("Well.")] * 2)) as client:
        for stream in (False, True):
            empty = await ask(client, stream=stream, messages=[USER])
            assert (empty.content, empty.stop_reason) == ([], "end_turn")
            history = [USER, {"role": "assistant", "content": empty.content}, USER]
            message = await client.messages.create(model="policy", max_tokens=9, messages=history)  # type: ignore[arg-type]
            assert "fork" not in (message.model_extra or {})


async def test_thinking_that_is_not_shown_comes_back_whole(serve: Serve) -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    async with client_of(await serve([THINKS, say_text("3")] * 2)) as client:
        for stream in (False, True):
            history: list[Any] = [USER]
            message = await ask(
                client, stream=stream, messages=history, tools=[CALCULATOR], thinking=thinking
            )
            first = message.content[0]
            assert first.type == "thinking"
            assert (first.thinking, bool(first.signature)) == ("", True)
            use = message.content[-1]
            assert use.type == "tool_use"
            result = {"type": "tool_result", "tool_use_id": use.id, "content": "3"}
            history += [message.to_param(), {"role": "user", "content": [result]}]
            after = await client.messages.create(
                model="policy",
                max_tokens=9,
                messages=history,
                tools=[CALCULATOR],
                thinking=thinking,  # type: ignore[arg-type,list-item]
            )
            assert "fork" not in (after.model_extra or {})


async def test_counting_tells_the_size_of_the_next_prompt(serve: Serve) -> None:
    async with client_of(await serve([say_text("Hello."), say_text("Fine.")])) as client:
        history: list[Any] = [USER]
        first = await client.messages.create(model="policy", max_tokens=9, messages=history, system="Be.")
        history += [first.to_param(), USER]
        count = await client.messages.count_tokens(model="policy", messages=history, system="Be.")
        second = await client.messages.create(model="policy", max_tokens=9, messages=history, system="Be.")
        with pytest.raises(NotFoundError, match="'other' does not exist"):
            await client.messages.count_tokens(model="other", messages=[USER])  # type: ignore[list-item]
    assert count.input_tokens == second.usage.input_tokens


async def test_an_aborted_generation_is_no_answer(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode("so")]), renderer)
    asked = MessagesSurface().read(
        {"model": "policy", "max_tokens": 9, "messages": [USER]}, model="policy", form="item"
    )
    response = await policy.respond(asked.requests[0])
    aborted = response.model_copy(update={"status": "cancelled"})
    with pytest.raises(ValueError, match="aborted"):
        message_of(aborted)


async def test_a_signature_holds_its_thinking(serve: Serve) -> None:
    async with client_of(await serve([THINKS])) as client:
        message = await ask(client, stream=False, messages=[USER], tools=[CALCULATOR])
    changed = [block.model_dump(exclude_unset=True) for block in message.content]
    changed[0]["thinking"] = "Something else."
    body = {
        "model": "policy",
        "max_tokens": 9,
        "messages": [USER, {"role": "assistant", "content": changed}, USER],
    }
    with pytest.raises(ValueError, match=r"^messages\.1\.content\.0\.signature: invalid `signature`"):
        MessagesSurface().read(body, model="policy", form="item")
    changed[0]["signature"] = "made elsewhere"
    asked = MessagesSurface().read(body, model="policy", form="item")
    thoughts = [item for item in asked.requests[0].input if isinstance(item, Reasoning)]
    assert [thought.text for thought in thoughts] == ["Something else."]
