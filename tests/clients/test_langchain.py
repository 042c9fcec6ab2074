"""LangChain's ChatOpenAI, unmodified, over Responses and over Chat Completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any, TypeAlias

import openai
import pytest
import pytest_asyncio
from support.agents import calculate, say_text
from support.clients import (
    ANSWER,
    ANSWERS,
    QUESTION,
    THINKS,
    TURNS,
    Answer,
    Scripted,
    named_call,
    policy_stats,
)

langchain_openai: Any = import_module("langchain_openai")
messages: Any = import_module("langchain_core.messages")
langchain_tools: Any = import_module("langchain_core.tools")

pytestmark = pytest.mark.asyncio

FORMS: dict[str, dict[str, Any]] = {
    "responses": {"use_responses_api": True},
    "responses-v1": {"use_responses_api": True, "output_version": "v1"},
    "chat": {"use_responses_api": False, "stream_usage": True},
}

Ask: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
MakeModel: TypeAlias = Callable[..., Any]


async def invoke(model: Any, asked: Any) -> Any:
    return await asyncio.to_thread(model.invoke, asked)


async def ainvoke(model: Any, asked: Any) -> Any:
    return await model.ainvoke(asked)


async def stream(model: Any, asked: Any) -> Any:
    return joined(await asyncio.to_thread(lambda: list(model.stream(asked))))


async def astream(model: Any, asked: Any) -> Any:
    return joined([chunk async for chunk in model.astream(asked)])


def joined(chunks: list[Any]) -> Any:
    """Join the chunks of a message; what was parsed comes anew in each."""
    return sum(chunks[1:], start=chunks[0]) if hasattr(chunks[0], "tool_calls") else chunks[-1]


forms = pytest.mark.parametrize("form", FORMS)
ways = pytest.mark.parametrize("ask", [invoke, ainvoke, stream, astream], ids=lambda ask: ask.__name__)


@langchain_tools.tool
def calculator(expression: str) -> str:
    """Evaluate an expression."""
    return calculate(f'{{"expression": "{expression}"}}')


@langchain_openai.custom_tool
def shell(command: str) -> str:
    """Run a command."""
    return f"{command}: a b"


TOOLS = {tool.name: tool for tool in (calculator, shell)}


@pytest_asyncio.fixture
async def model_of(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeModel]:
    """Makes models whose connections are closed in the end; LangChain would keep its own."""
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    async with AsyncExitStack() as stack:

        def make(url: str, **fields: Any) -> Any:
            return langchain_openai.ChatOpenAI(
                model="policy",
                base_url=url,
                api_key="none",
                max_retries=0,
                http_client=stack.enter_context(openai.DefaultHttpxClient()),
                http_async_client=stack.push_async_exit(openai.DefaultAsyncHttpxClient()),
                **fields,
            )

        yield make


async def loop(model: Any, ask: Ask, question: str = QUESTION) -> list[Any]:
    """Ask until there is no call left; return the conversation."""
    history = [messages.HumanMessage(question)]
    for _ in range(8):
        said = await ask(model, history)
        history.append(said)
        if not said.tool_calls:
            return history
        history += [TOOLS[call["name"]].invoke(call) for call in said.tool_calls]
    raise AssertionError("the policy never stopped calling")


async def assert_one_conversation(url: str, turns: int) -> None:
    stats = await policy_stats(url)
    assert (stats["responses"], stats["forks"]) == (turns, 0)


@forms
@ways
async def test_a_loop_with_tools(scripted: Scripted, model_of: MakeModel, form: str, ask: Ask) -> None:
    url = await scripted(TURNS)
    history = await loop(model_of(url, **FORMS[form]).bind_tools([calculator]), ask)
    assert [message.text for message in history if message.type == "tool"] == ["3", "7"]
    assert history[-1].text.strip() == "It is 7."
    usage = history[-1].usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > usage["input_tokens"] > 0
    await assert_one_conversation(url, 3)


@ways
async def test_a_loop_by_response_ids(scripted: Scripted, model_of: MakeModel, ask: Ask) -> None:
    url = await scripted(TURNS)
    model = model_of(url, use_responses_api=True, use_previous_response_id=True)
    history = await loop(model.bind_tools([calculator]), ask)
    assert history[-1].text.strip() == "It is 7."
    assert history[-1].response_metadata["id"].startswith("resp_")
    await assert_one_conversation(url, 3)


@ways
async def test_thinking_that_is_sealed(scripted: Scripted, model_of: MakeModel, ask: Ask) -> None:
    url = await scripted(TURNS)
    model = model_of(
        url,
        use_responses_api=True,
        store=False,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": "auto"},
    )
    history = await loop(model.bind_tools([calculator]), ask)
    assert history[-1].text.strip() == "It is 7."
    thoughts = [block for block in history[-1].content if block["type"] == "reasoning"]
    assert [bool(thought["encrypted_content"]) for thought in thoughts] == [True]
    await assert_one_conversation(url, 3)


@ways
async def test_a_custom_tool(scripted: Scripted, model_of: MakeModel, ask: Ask) -> None:
    url = await scripted([THINKS + named_call("shell", input="ls -l"), THINKS + say_text("Two files.")])
    history = await loop(model_of(url, use_responses_api=True).bind_tools([shell]), ask)
    assert [message.content[0]["output"] for message in history if message.type == "tool"] == ["ls -l: a b"]
    assert history[-1].text.strip() == "Two files."
    await assert_one_conversation(url, 2)


# openai's event of a parsed chat does not declare the type of what was parsed, and LangChain dumps it
unparsed = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")


@unparsed
@forms
@ways
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_structured_output(
    scripted: Scripted, model_of: MakeModel, form: str, ask: Ask, method: str
) -> None:
    says = named_call("Answer", **ANSWER.model_dump()) if method == "function_calling" else ANSWERS
    model = model_of(await scripted([THINKS + says]), **FORMS[form])
    assert await ask(model.with_structured_output(Answer, method=method), "Answer in JSON.") == ANSWER


@unparsed
@forms
@ways
async def test_structured_output_of_the_real_policy(
    policy_url: str, model_of: MakeModel, form: str, ask: Ask
) -> None:
    model = model_of(policy_url, **FORMS[form])
    for method in ("json_schema", "function_calling"):
        # without `strict`, a tool's schema leaves room for endless properties
        structured = model.with_structured_output(Answer, method=method, strict=True)
        assert isinstance(await ask(structured, QUESTION), Answer)


@forms
@ways
async def test_refusals(scripted: Scripted, model_of: MakeModel, form: str, ask: Ask) -> None:
    model = model_of(await scripted([]), temperature=-1, **FORMS[form])
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        await ask(model, QUESTION)
    assert refused.value.param == "temperature"
