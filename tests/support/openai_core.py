"""What users do with the openai package, old or new: each check has what the policy says meanwhile.

The checks assert what the package hands to its user. They run in order against one server, or each alone.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import openai
from openai import AsyncOpenAI

from support.agents import TOOL, calculate, call_text, chat_agent, responses_agent, say_text
from support.clients import ANSWER, ANSWERS, SHELL, THINKS, Answer, Calculation, named_call

__all__ = ["CHECKS", "USER", "Check"]

Play: TypeAlias = Callable[[AsyncOpenAI], Awaitable[None]]


@dataclass(frozen=True)
class Check:
    """What a user does, and what the policy says to it."""

    says: tuple[str, ...]
    play: Play

    @property
    def name(self) -> str:
        return self.play.__name__


CHECKS: list[Check] = []

CALCULATES = named_call("Calculation", expression="1 + 2")
USER: Any = {"role": "user", "content": "What is 1 + 2?"}


def check(*says: str) -> Callable[[Play], Play]:
    """Add a check to which the policy says these things in turn."""

    def add(play: Play) -> Play:
        CHECKS.append(Check(says, play))
        return play

    return add


async def refused(asking: Awaitable[Any]) -> openai.APIStatusError:
    """Return the error with which a request is refused."""
    try:
        await asking
    except openai.APIStatusError as error:
        return error
    raise AssertionError("it was not refused")


@check(THINKS + say_text("It is 3."))
async def a_response(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="policy", input="What is 1 + 2?", metadata={"run": "1"})
    assert (response.output_text.strip(), response.status, response.error) == ("It is 3.", "completed", None)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.metadata == {"run": "1"}
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response._request_id


@check(THINKS + say_text("It is 3."))
async def the_events_of_a_response(client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="policy", input="q", stream=True)
    events = [event async for event in stream]
    assert [events[0].type, events[1].type] == ["response.created", "response.in_progress"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    last = events[-1]
    assert last.type == "response.completed"
    assert text == last.response.output_text
    assert (text.strip(), thought.strip()) == ("It is 3.", "well")


@check(*[call_text("1 + 2"), call_text("3 + 4"), say_text("It is 7.")] * 4)
async def loops_with_tools(client: AsyncOpenAI) -> None:
    for stream in (False, True):
        assert await responses_agent(client, "1 + 2 + 4?", stream=stream) == "It is 7."
        assert await chat_agent(client, "1 + 2 + 4?", stream=stream) == "It is 7."


@check(call_text("1 + 2"), say_text("It is 3."))
async def a_loop_by_response_ids(client: AsyncOpenAI) -> None:
    fields: Any = {"model": "policy", "tools": [TOOL]}
    first = await client.responses.create(input="1 + 2?", **fields)
    call: Any = first.output[-1]
    output: Any = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": calculate(call.arguments),
    }
    second: Any = await client.responses.create(input=[output], previous_response_id=first.id, **fields)
    assert (second.output_text, second.previous_response_id) == ("It is 3.", first.id)
    assert not hasattr(second, "fork")


@check(ANSWERS, ANSWERS)
async def parsed_responses(client: AsyncOpenAI) -> None:
    response = await client.responses.parse(model="policy", input="q", text_format=Answer)
    assert response.output_parsed == ANSWER
    async with client.responses.stream(model="policy", input="q", text_format=Answer) as stream:
        done = [event.parsed async for event in stream if event.type == "response.output_text.done"]
        final = await stream.get_final_response()
    assert done == [ANSWER]
    assert final.output_parsed == ANSWER


@check(say_text("One, two."))
async def the_streams_helper(client: AsyncOpenAI) -> None:
    async with client.responses.stream(model="policy", input="Count.") as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == "One, two."
    assert all("One, two.".startswith(snapshot) for snapshot in snapshots)


@check(
    CALCULATES,
    say_text("It is 3."),
    CALCULATES,
)
async def parsed_calls(client: AsyncOpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Calculation)]
    history: list[Any] = [USER]
    response = await client.responses.parse(model="policy", input=history, tools=tools)
    call: Any = response.output[-1]
    assert (call.name, call.parsed_arguments) == ("Calculation", Calculation(expression="1 + 2"))
    history += response.output
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "3"})
    response = await client.responses.parse(model="policy", input=history, tools=tools)
    assert response.output_text == "It is 3."
    async with client.responses.stream(model="policy", input=[USER], tools=tools) as stream:
        arguments = [event.snapshot async for event in stream if event.type.endswith("arguments.delta")]  # type: ignore[union-attr]
        final: Any = await stream.get_final_response()
    assert json.loads(arguments[-1]) == {"expression": "1 + 2"}
    assert final.output[-1].parsed_arguments == Calculation(expression="1 + 2")


@check(named_call("shell", input="ls -l"), say_text("Two files."), named_call("shell", input="ls -l"))
async def custom_tools(client: AsyncOpenAI) -> None:
    history: list[Any] = [{"role": "user", "content": "What is here?"}]
    response = await client.responses.create(model="policy", input=history, tools=[SHELL])
    call: Any = response.output[-1]
    assert (call.type, call.name, call.input) == ("custom_tool_call", "shell", "ls -l")
    history += response.output
    history.append({"type": "custom_tool_call_output", "call_id": call.call_id, "output": "a b"})
    response = await client.responses.create(model="policy", input=history, tools=[SHELL])
    assert response.output_text == "Two files."
    stream = await client.responses.create(model="policy", input="q", tools=[SHELL], stream=True)
    events: list[Any] = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == "ls -l"
    assert events[-1].response.output[-1].input == "ls -l"


@check(THINKS + say_text("It is 3."))
async def a_chat_completion(client: AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model="policy", messages=[USER])
    choice = completion.choices[0]
    assert ((choice.message.content or "").strip(), choice.finish_reason) == ("It is 3.", "stop")
    assert completion.usage is not None
    assert completion.usage.completion_tokens > 0
    assert completion._request_id


@check(say_text("It is 3."), say_text("It is 3."))
async def the_chunks_of_a_chat(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="policy", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "It is 3."
    assert chunks[-1].usage is not None
    async with client.chat.completions.stream(model="policy", messages=[USER]) as helper:
        kinds = [event.type async for event in helper]
        final = await helper.get_final_completion()
    assert "content.delta" in kinds
    assert kinds.count("content.done") == 1
    assert final.choices[0].message.content == "It is 3."


@check(
    ANSWERS,
    ANSWERS,
    CALCULATES,
    CALCULATES,
)
async def parsed_chats(client: AsyncOpenAI) -> None:
    fields: Any = {"model": "policy", "messages": [USER]}
    completion = await client.chat.completions.parse(**fields, response_format=Answer)
    assert completion.choices[0].message.parsed == ANSWER
    async with client.chat.completions.stream(**fields, response_format=Answer) as stream:
        done = [event.parsed async for event in stream if event.type == "content.done"]
    assert done == [ANSWER]
    fields["tools"] = [openai.pydantic_function_tool(Calculation)]
    completion = await client.chat.completions.parse(**fields)
    calls = completion.choices[0].message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [Calculation(expression="1 + 2")]
    async with client.chat.completions.stream(**fields) as stream:
        called = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in called] == [Calculation(expression="1 + 2")]


@check(say_text("3."), say_text("3."))
async def a_completion(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(model="policy", prompt="1 + 2 = ", max_tokens=20)
    assert [(choice.text, choice.finish_reason) for choice in completion.choices] == [("3.", "stop")]
    stream = await client.completions.create(model="policy", prompt="1 + 2 = ", max_tokens=20, stream=True)
    assert "".join([choice.text async for chunk in stream for choice in chunk.choices]) == "3."


@check(say_text("Hello."), say_text("Again."))
async def what_is_kept(client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="policy", input=[USER], store=True)
    second = await client.responses.create(model="policy", input="And?", previous_response_id=first.id)
    again = await client.responses.retrieve(second.id)
    assert (again.id, again.output_text) == (second.id, "Again.")
    listed: Any = client.responses.input_items.list(second.id, limit=1, order="asc")
    assert [item.content[0].text async for item in listed] == [USER["content"], "Hello.", "And?"]
    await client.responses.delete(second.id)
    for lost in (client.responses.retrieve(second.id), client.responses.delete(second.id)):
        assert (await refused(lost)).status_code == 404


@check(say_text("Hello."))
async def prompts_are_counted(client: AsyncOpenAI) -> None:
    counted = await client.responses.input_tokens.count(
        model="policy", input=[USER], instructions="Be brief."
    )
    response = await client.responses.create(model="policy", input=[USER], instructions="Be brief.")
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens


@check(say_text("Hello."), say_text("Hello."))
async def the_background(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="policy", input="q", background=True)
    while response.status in ("queued", "in_progress"):
        response = await client.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", "Hello.")
    stream = await client.responses.create(model="policy", input="q", background=True, stream=True)
    events: list[Any] = [event async for event in stream]
    response_id = events[0].response.id
    followed = await client.responses.retrieve(response_id, stream=True, starting_after=1)
    assert [event async for event in followed] == events[2:]
    async with client.responses.stream(response_id=response_id) as again:
        kinds = [event.type async for event in again]
        final = await again.get_final_response()
    assert kinds == [event.type for event in events]
    assert final.output_text == "Hello."


@check(say_text("Hello."), say_text("Hello."))
async def raw_responses(client: AsyncOpenAI) -> None:
    raw = await client.responses.with_raw_response.create(
        model="policy", input="q", extra_headers={"x-request-id": "mine"}
    )
    response = raw.parse()
    assert (raw.headers["x-request-id"], raw.request_id, response._request_id) == ("mine",) * 3
    assert float(raw.headers["openai-processing-ms"]) >= 0
    assert response.output_text == "Hello."
    streaming = client.responses.with_streaming_response
    async with streaming.create(model="policy", input="q") as answer:
        assert answer.headers["content-type"].startswith("application/json")
        assert (await answer.parse()).output_text == "Hello."


@check()
async def the_model(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["policy"]
    assert (await client.models.retrieve("policy")).object == "model"
    error = await refused(client.models.retrieve("gpt-9"))
    assert isinstance(error, openai.NotFoundError)
    assert error.code == "model_not_found"


@check()
async def refusals(client: AsyncOpenAI) -> None:
    for fields, param, code in (
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
    ):
        for stream in (False, True):
            asked: Any = {"model": "policy", "input": "q", "stream": stream, **fields}
            error = await refused(client.responses.create(**asked))
            assert isinstance(error, openai.BadRequestError)
            assert (error.param, error.code) == (param, code)
            assert error.request_id
