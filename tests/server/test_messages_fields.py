"""Which fields of a Messages body mean what, and how those are refused that cannot be honoured."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic import APIStatusError, AsyncAnthropic
from support.agents import say_text
from support.capturing import Serve
from support.claude import CALCULATOR
from support.held import HeldEngine

from backends.rendering import TemplateRenderer
from backends.server.surfaces import MessagesSurface, prompt_request
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionCallOutput, Message, ResponseRequest, TextFormat

USER = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "a"}
RESULT = {"type": "tool_result", "tool_use_id": "x"}
SEALED = {"type": "redacted_thinking", "data": "elsewhere"}
BODY = {"model": "policy", "max_tokens": 2048, "messages": [USER]}


def read(**fields: Any) -> ResponseRequest:
    asked = MessagesSurface().read({**BODY, **fields}, model="policy", form="item")
    return asked.requests[0]


def test_fields_become_those_of_the_responses_api() -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    request = read(
        system=[{"type": "text", "text": "Be ", **cached}, {"type": "text", "text": "brief."}],
        tools=[{**CALCULATOR, "type": "custom", "strict": True, **cached}],
        tool_choice={"type": "tool", "name": "calculator", "disable_parallel_tool_use": True},
        stop_sequences=["\n"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        seed=7,
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        metadata={"user_id": "u"},
        service_tier="auto",
        **cached,
    )
    assert request.instructions == "Be brief."
    (tool,) = request.tools or ()
    assert getattr(tool, "strict", None) is True
    assert request.tool_choice == {"type": "function", "name": "calculator"}
    assert request.parallel_tool_calls is False
    assert (request.stop, request.temperature, request.top_k, request.top_p) == (["\n"], 0.5, 3, 0.9)
    assert (request.max_output_tokens, request.seed, request.user) == (2048, 7, "u")
    assert request.reasoning is not None
    assert request.reasoning.effort == "high"
    assert request.text is not None
    assert request.text.format == TextFormat(
        type="json_schema", name="answer", schema={"type": "object"}, strict=True
    )


@pytest.mark.parametrize(
    ("thinking", "effort", "switches"),
    [
        ({"type": "disabled"}, "none", None),
        ({"type": "adaptive"}, None, {"enable_thinking": True, "thinking": True}),
        (None, None, None),
    ],
)
def test_thinking_is_the_switch_of_the_template(
    thinking: Any, effort: str | None, switches: dict[str, bool] | None
) -> None:
    request = read(thinking=thinking)
    assert (None if request.reasoning is None else request.reasoning.effort) == effort
    assert request.chat_template_kwargs == switches


def test_results_of_tools_come_before_what_the_user_says() -> None:
    no = {"type": "text", "text": "no"}
    result = {**RESULT, "is_error": True, "content": [no]}
    request = read(messages=[{"role": "user", "content": [result, TEXT, TEXT]}])
    output, said = request.input
    assert isinstance(output, FunctionCallOutput)
    assert (output.call_id, output.text) == ("x", "no")
    assert output.to_wire()["is_error"] is True
    assert isinstance(said, Message)
    assert (said.role, said.text) == ("user", "aa")


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
SERVER_TOOL = {"type": "web_search_20250305", "name": "web_search", "max_uses": 1}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"frequency_penalty": 0}, "frequency_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [USER, {"role": "assistant", "content": "And"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [TEXT, IMAGE]}]}, "messages.0.content.1"),
        ({"messages": [{"role": "user", "content": [{**TEXT, "more": 1}]}]}, "messages.0.content.0.more"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {
                "messages": [
                    {"role": "system", "content": [RESULT]},
                    USER,
                ]
            },
            "messages.0.content.0",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{**RESULT, "content": [IMAGE]}],
                    }
                ]
            },
            "messages.0.content.0.content.0",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [SEALED]},
                    USER,
                ]
            },
            "messages.0.content.0.data",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "prompt_token_ids": [1]}, USER]},
            "messages.0",
        ),
        ({"system": [IMAGE]}, "system.0"),
        ({"tools": [SERVER_TOOL]}, "tools.0"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{**CALCULATOR, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, "output_config.effort"),
        ({"speed": "fast"}, "speed"),
        ({"container": "c"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read(**fields)
    assert caught.value.param == path
    assert str(caught.value).startswith(f"{path}: ")


def test_a_budget_is_a_part_of_the_tokens() -> None:
    with pytest.raises(PolicyError, match="budget_tokens"):
        read(thinking={"type": "enabled", "budget_tokens": 2048})


@pytest.mark.parametrize(
    ("param", "named"),
    [
        ("input[2].content", "messages.1.content.1"),
        ("input", "messages"),
        ("tools[3].parameters", "tools.3.input_schema"),
        ("max_output_tokens", "max_tokens"),
        ("stop[0]", "stop_sequences.0"),
        ("text.format.schema", "output_config.format.schema"),
        ("instructions", "system"),
        ("model", "model"),
    ],
)
def test_the_core_is_translated(param: str, named: str) -> None:
    messages = [USER, {"role": "user", "content": [RESULT, TEXT]}]
    _, words = prompt_request({"model": "policy", "messages": messages})
    error = words(PolicyError(f"{param} is odd", param=param))
    assert (str(error), error.param) == (f"{named} is odd", named)


@pytest.mark.asyncio
async def test_errors_have_anthropics_shape(serve: Serve) -> None:
    url = await serve([])
    async with AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0) as client:
        ask = client.messages.create
        with pytest.raises(APIStatusError) as caught:
            await ask(model="policy", max_tokens=9, messages=[USER], tool_choice={"type": "any"})  # type: ignore[list-item]
        assert caught.value.body == {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "tool_choice is `any`, and there are no tools",
            },
            "request_id": caught.value.request_id,
        }
        with pytest.raises(APIStatusError, match="messages: the prompt has"):
            await ask(model="policy", max_tokens=9, messages=[{"role": "user", "content": "a b " * 90_000}])


@pytest.mark.asyncio
async def test_a_failure_in_a_stream_is_an_event(serve: Serve, renderer: TemplateRenderer) -> None:
    engine = HeldEngine([renderer.encode(say_text("x"))], error=RuntimeError("broken"), after_s=0.2)
    url = await serve(engine=engine)
    async with AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0) as client:
        stream = await client.messages.create(model="policy", max_tokens=9, messages=[USER], stream=True)  # type: ignore[list-item]
        assert (await anext(stream)).type == "message_start"
        with pytest.raises(APIStatusError, match="broken"):
            await anext(stream)
