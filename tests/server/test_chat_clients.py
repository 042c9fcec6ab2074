"""Real clients of Chat Completions and Completions: openai's helpers, old and new, and LangChain."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel
from support.agents import CHAT_TOOL, calculate, call_text, say_text
from support.capturing import Serve

pytestmark = pytest.mark.asyncio

USER: Any = {"role": "user", "content": "1 + 2 ="}
RUN: Any = {"type": "custom", "custom": {"name": "run"}}
RUN_CALL = '<tool_call>\n{"name": "run", "arguments": {"input": "print(1)"}}\n</tool_call><|im_end|>'
SUM = '{"sum": 3}'


class Sum(BaseModel):
    """What is asked for."""

    sum: int


async def test_the_packages_are_the_ones_that_count() -> None:
    import openai

    assert int(openai.__version__.split(".")[0]) >= 3


# openai warns of its own `parsed` when it sends a message back
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
async def test_openai_parses_into_a_model(serve: Serve) -> None:
    url = await serve([say_text(SUM), say_text(SUM), say_text(SUM)])
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        parsed: Any = await client.chat.completions.parse(
            model="policy", messages=[USER], response_format=Sum
        )
        message = parsed.choices[0].message
        assert message.parsed == Sum(sum=3)
        # what the helper returns can be sent back as it is
        await client.chat.completions.create(model="policy", messages=[USER, message, USER])
        async with client.chat.completions.stream(
            model="policy", messages=[USER], response_format=Sum, logprobs=True
        ) as stream:
            kinds = {event.type async for event in stream}
            final: Any = await stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.done", "chunk"} <= kinds
    assert final.choices[0].message.parsed == Sum(sum=3)
    assert final.choices[0].message.generation_token_ids
    assert final.system_fingerprint == "0"


async def test_openai_streams_calls_of_both_kinds(serve: Serve) -> None:
    url = await serve([call_text("1 + 2"), RUN_CALL, say_text("1")])
    tools: Any = [CHAT_TOOL, RUN]
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        async with client.chat.completions.stream(model="policy", messages=[USER], tools=tools) as stream:
            kinds = {event.type async for event in stream}
            final: Any = await stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        assert calculate(final.choices[0].message.tool_calls[0].function.arguments) == "3"
        stream_of_chunks = await client.chat.completions.create(
            model="policy", messages=[USER], tools=tools, stream=True
        )
        deltas: list[Any] = [chunk.choices[0].delta async for chunk in stream_of_chunks]
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (call.type, call.custom) == ("custom", {"name": "run", "input": "print(1)"})


async def test_openai_reads_completions(serve: Serve) -> None:
    url = await serve(["one two", "one two", "one"])
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole: Any = await client.completions.create(model="policy", prompt="count:", logprobs=1)
        assert whole.choices[0].text == "one two"
        assert "".join(whole.choices[0].logprobs.tokens) == "one two"
        stream = await client.completions.create(
            model="policy",
            prompt="count:",
            stop=[" two"],
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "one"
        assert last.usage is not None
        assert last.usage.completion_tokens == len(chunks[-1].choices[0].generation_token_ids)  # type: ignore[attr-defined]
        with pytest.raises(BadRequestError, match="inserted"):
            await client.completions.create(model="policy", prompt="count:", suffix="!")


@tool
def calculator(expression: str) -> str:
    """Evaluate an expression."""
    return str(sum(int(number) for number in expression.split("+")))


def chat_model(url: str, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model="policy", base_url=url, api_key="none", use_responses_api=False, **fields)


@pytest.mark.parametrize("streaming", [False, True])
async def test_langchain_calls_tools(serve: Serve, streaming: bool) -> None:
    url = await serve([call_text("1 + 2"), say_text("It is 3.")])
    model = chat_model(url, stream_usage=True).bind_tools([calculator])
    history: list[Any] = [HumanMessage("1 + 2?")]
    for _ in range(2):
        if streaming:
            message: Any = None
            async for chunk in model.astream(history):
                assert isinstance(chunk, AIMessageChunk)
                message = chunk if message is None else message + chunk
        else:
            message = await model.ainvoke(history)
        assert message.usage_metadata["output_tokens"] > 0
        history.append(message)
        history += [
            ToolMessage(await calculator.ainvoke(call["args"]), tool_call_id=call["id"])
            for call in message.tool_calls
        ]
    assert message.content == "It is 3."
    assert message.response_metadata["finish_reason"] == "stop"


async def test_langchain_gets_structured_output_and_log_probs(serve: Serve) -> None:
    url = await serve([say_text(SUM), call_for_sum(), say_text("It is 3.")])
    model = chat_model(url, temperature=0.5, seed=1)
    assert await model.with_structured_output(Sum, method="json_schema").ainvoke("1 + 2?") == Sum(sum=3)
    assert await model.with_structured_output(Sum, method="function_calling").ainvoke("1 + 2?") == Sum(sum=3)
    scored = await model.bind(logprobs=True, top_logprobs=0).ainvoke("1 + 2?")
    entries = scored.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == "It is 3."


def call_for_sum() -> str:
    return '<tool_call>\n{"name": "Sum", "arguments": {"sum": 3}}\n</tool_call><|im_end|>'


OLD_CLIENT = """
import asyncio, sys, openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

class Sum(BaseModel):
    sum: int

USER = {"role": "user", "content": "1 + 2 ="}

async def main(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        chat = client.chat.completions
        whole = await chat.create(model="policy", messages=[USER], logprobs=True, top_logprobs=0)
        ChatCompletion.model_validate(whole.model_dump())
        assert whole.choices[0].message.generation_token_ids
        parsed = await chat.parse(model="policy", messages=[USER], response_format=Sum)
        assert parsed.choices[0].message.parsed == Sum(sum=3)
        async with chat.stream(model="policy", messages=[USER], response_format=Sum) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == Sum(sum=3)
        async for chunk in await chat.create(model="policy", messages=[USER], stream=True):
            ChatCompletionChunk.model_validate(chunk.model_dump())
        text = await client.completions.create(model="policy", prompt=[5, 6], logprobs=0)
        Completion.model_validate(text.model_dump())
        assert text.choices[0].generation_token_ids
    print(openai.__version__)

asyncio.run(main(sys.argv[1]))
"""


async def test_the_oldest_openai_package_does_it_all(serve: Serve) -> None:
    url = await serve([say_text(SUM)] * 5)
    folder = Path(sys.prefix) / "openai-2.8.0"
    assert folder.is_dir(), "openai 2.8.0 is not beside the environment; `make test` puts it there"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", OLD_CLIENT, url],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.8.0"
