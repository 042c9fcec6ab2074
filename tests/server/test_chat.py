"""Chat Completions: what is asked, what comes back, and what is refused by its own name."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from openai.types.chat import ChatCompletion
from support.agents import CHAT_TOOL, call_text, say_text
from support.capturing import Serve
from support.chatting import error_of, post

from backends.policy import Policy
from backends.server.surfaces.chat_request import ChatRequest
from gym_sdk.errors import PolicyError
from gym_sdk.schema import CustomToolCall, CustomToolCallOutput, FunctionCall, Message, Reasoning

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "1 + 2 ="}
ASK: dict[str, Any] = {"messages": [USER], "max_tokens": 8, "seed": 1}
RUN = {"type": "custom", "custom": {"name": "run", "description": "Run a program."}}
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["sum"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}


async def complete(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a completion that openai's own type takes."""
    status, answer = await post(f"{url}/chat/completions", body)
    assert status == 200, answer
    ChatCompletion.model_validate(answer)
    completion: dict[str, Any] = answer
    return completion


async def test_a_completion_has_all_that_openai_says(chat_url: str) -> None:
    completion = await complete(chat_url, {**ASK, "logprobs": True, "top_logprobs": 3})
    (choice,) = completion["choices"]
    message, usage = choice["message"], completion["usage"]
    generated = len(message["generation_token_ids"])
    assert completion["system_fingerprint"] == "0"
    assert completion["service_tier"] == "default"
    assert isinstance(completion["created"], int)
    assert completion["id"].startswith("chatcmpl-")
    assert choice["finish_reason"] == ("length" if generated == 8 else "stop")
    assert choice["stop_reason"] is None
    assert len(message["generation_log_probs"]) == generated
    assert message["weight_versions"] == [{"version": "0", "start": 0, "end": generated}]
    assert usage["prompt_tokens"] == len(message["prompt_token_ids"])
    assert usage["completion_tokens"] == generated
    assert usage["total_tokens"] == usage["prompt_tokens"] + generated
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert choice["logprobs"]["refusal"] is None
    scores = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in scores] == message["generation_log_probs"][: len(scores)]
    assert all(len(entry["top_logprobs"]) == 3 for entry in scores)
    text = b"".join(bytes(entry["bytes"]) for entry in scores).decode(errors="replace")
    assert message["content"] in text
    assert (await complete(chat_url, ASK))["choices"][0]["logprobs"] is None


async def test_every_choice_is_sampled_for_itself(chat_url: str) -> None:
    completion = await complete(chat_url, {**ASK, "n": 4})
    choices = completion["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    sampled = [choice["message"]["generation_token_ids"] for choice in choices]
    assert len({tuple(ids) for ids in sampled}) == 4
    assert len({tuple(choice["message"]["prompt_token_ids"]) for choice in choices}) == 1
    # the prompt counts once
    assert completion["usage"]["prompt_tokens"] == len(choices[0]["message"]["prompt_token_ids"])
    assert completion["usage"]["completion_tokens"] == sum(map(len, sampled))
    third = await complete(chat_url, {**ASK, "seed": 3})
    assert third["choices"][0]["message"]["generation_token_ids"] == sampled[2]


async def test_a_stop_string_ends_the_text_before_it(serve: Serve) -> None:
    url = await serve([say_text("one two three")] * 2)
    completion = await complete(url, {"messages": [USER], "stop": ["never", " two"]})
    (choice,) = completion["choices"]
    assert choice["message"]["content"] == "one"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " two")
    alone = await complete(url, {"messages": [USER], "stop": "three"})
    assert alone["choices"][0]["message"]["content"] == "one two "


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "calculator"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "calculator"}}],
            },
        },
    ],
)
async def test_a_demanded_call_is_made(chat_url: str, choice: Any) -> None:
    for seed in range(8):
        body = {"messages": [USER], "tools": [CHAT_TOOL, RUN], "tool_choice": choice, "seed": seed}
        completion = await complete(chat_url, {**body, "max_tokens": 300, "parallel_tool_calls": False})
        (answer,) = completion["choices"]
        if answer["finish_reason"] == "length":
            continue  # an untrained policy can fill a string for ever
        (call,) = answer["message"]["tool_calls"]
        if choice != "required":
            assert call["function"]["name"] == "calculator"
        assert answer["finish_reason"] == "tool_calls"
        return
    raise AssertionError("no call was finished")


async def test_no_tool_is_called_if_none_may_be(chat_url: str) -> None:
    offered = await complete(chat_url, {**ASK, "tools": [CHAT_TOOL]})
    silent = await complete(chat_url, {**ASK, "tools": [CHAT_TOOL], "tool_choice": "none"})
    bare = await complete(chat_url, ASK)
    sizes = [answer["usage"]["prompt_tokens"] for answer in (offered, silent, bare)]
    assert sizes[0] > sizes[1] == sizes[2]


@pytest.mark.parametrize("form", [NAMED, {"type": "json_object"}])
async def test_a_response_format_is_kept(chat_url: str, form: Any) -> None:
    for seed in range(8):
        body = {"messages": [USER], "response_format": form, "seed": seed, "max_tokens": 200}
        (choice,) = (await complete(chat_url, body))["choices"]
        if choice["finish_reason"] == "stop":
            answer = json.loads(choice["message"]["content"])
            assert isinstance(answer, dict)
            if form is NAMED:
                assert answer["sum"] in range(10)
            return
    raise AssertionError("no answer was finished")


async def test_a_custom_tool_is_called_with_text(serve: Serve) -> None:
    call = '<tool_call>\n{"name": "run", "arguments": {"input": "print(1)"}}\n</tool_call><|im_end|>'
    url = await serve([call, say_text("1")])
    first = await complete(url, {"messages": [USER], "tools": [RUN]})
    message = first["choices"][0]["message"]
    assert first["choices"][0]["finish_reason"] == "tool_calls"
    (made,) = message["tool_calls"]
    assert made == {"id": made["id"], "type": "custom", "custom": {"name": "run", "input": "print(1)"}}
    output = {"role": "tool", "tool_call_id": made["id"], "content": "1"}
    second = await complete(url, {"messages": [USER, message, output], "tools": [RUN]})
    tokens = [*message["prompt_token_ids"], *message["generation_token_ids"]]
    assert second["choices"][0]["message"]["prompt_token_ids"][: len(tokens)] == tokens


@pytest.mark.parametrize("echoed", ["whole", "without tokens", "without thinking"])
async def test_what_is_sent_back_continues_what_was_sampled(serve: Serve, echoed: str) -> None:
    thought = "<think>\nSo.\n</think>\n\nLet me see.\n" + call_text("1 + 2")
    url = await serve([thought, say_text("It is 3.")])
    first = await complete(url, {"messages": [USER], "tools": [CHAT_TOOL]})
    message = first["choices"][0]["message"]
    assert message["reasoning_content"].strip() == "So."
    assert first["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    tokens = [*message["prompt_token_ids"], *message["generation_token_ids"]]
    if echoed != "whole":
        message = {
            name: value for name, value in message.items() if name in ("role", "content", "tool_calls")
        }
    if echoed == "without tokens":
        message["reasoning"] = first["choices"][0]["message"]["reasoning_content"]
    output = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"}
    second = await complete(url, {"messages": [USER, message, output], "tools": [CHAT_TOOL]})
    assert second["choices"][0]["message"]["prompt_token_ids"][: len(tokens)] == tokens


async def test_messages_become_items() -> None:
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}},
        {"id": "call_2", "type": "custom", "custom": {"name": "run", "input": "ls"}, "index": 1},
    ]
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        },
        {"role": "user", "content": "hi", "name": "bob"},
        {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": calls, "annotations": []},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "a b"}]},
        {"role": "assistant", "content": "No", "refusal": "I will not."},
        {"role": "user", "content": "why?", "name": "bob"},
    ]
    (request,) = ChatRequest.read({"messages": messages}).choices
    developer, user, thought, call, custom, output, refusal, _ = request.input
    assert isinstance(developer, Message)
    assert developer.text == "Be brief."
    assert isinstance(user, Message)
    assert isinstance(thought, Reasoning)
    assert thought.text == "Hm."
    assert isinstance(call, FunctionCall)
    assert isinstance(custom, CustomToolCall)
    assert isinstance(output, CustomToolCallOutput)
    assert (output.call_id, output.output) == ("call_2", "a b")
    assert isinstance(refusal, Message)
    assert refusal.text == "NoI will not."


async def test_a_refusal_can_stand_in_a_history(chat_url: str, chat_policy: Policy) -> None:
    messages = [USER, {"role": "assistant", "content": None, "refusal": "I will not."}, USER]
    completion = await complete(chat_url, {**ASK, "messages": messages})
    prompt = completion["choices"][0]["message"]["prompt_token_ids"]
    assert "I will not." in chat_policy.renderer.decode(prompt)


async def test_what_openai_has_and_this_server_means_too() -> None:
    body = {
        **ASK,
        "model": "policy",
        "n": 1,
        "stop": None,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "modalities": ["text"],
        "metadata": {"run": "7"},
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "service_tier": "auto",
        "store": False,
        "stream": False,
        "user": "u",
        "verbosity": "medium",
        "response_format": {"type": "text"},
        "tools": [],
        "web_search_options": None,
    }
    (request,) = ChatRequest.read(body).choices
    assert request.max_output_tokens == 8
    assert request.tools is None
    assert request.user == "u"


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, fields]}


TOKENS = {"prompt_token_ids": [1, 2], "generation_token_ids": [3]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": None}, "messages", "at least one"),
        ({"messages": ["hi"]}, "messages[0]", "object"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing"),
        (message(role="function", name="f", content="1"), "messages[1].role", "tool"),
        (message(role="user"), "messages[1].content", "missing"),
        (message(role="user", content=7), "messages[1].content", "text"),
        (message(role="user", content=["hi"]), "messages[1].content[0]", "object"),
        (
            message(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            "messages[1].content[0].type",
            "only text",
        ),
        (
            message(role="user", content=[{"type": "text", "text": "a"}, {"type": "input_audio"}]),
            "messages[1].content[1].type",
            "only text",
        ),
        (message(role="user", content=[{"type": "file"}]), "messages[1].content[0].type", "only text"),
        (message(role="user", content=[{"type": "text"}]), "messages[1].content[0].text", "missing"),
        (
            message(role="user", content=[{"type": "refusal", "refusal": "no"}]),
            "messages[1].content[0].type",
            "assistants",
        ),
        (message(role="user", content="hi", name="bob"), "messages[1].name", "apart"),
        (message(role="user", content="hi", mood="good"), "messages[1].mood", "not supported"),
        (message(role="tool", content="3"), "messages[1].tool_call_id", "missing"),
        (message(role="assistant", audio={"id": "a"}), "messages[1].audio", "not supported"),
        (
            message(role="assistant", function_call={"name": "f"}),
            "messages[1].function_call",
            "not supported",
        ),
        (message(role="assistant", tool_calls={}), "messages[1].tool_calls", "list"),
        (message(role="assistant", tool_calls=[{}]), "messages[1].tool_calls[0].function", "missing"),
        (
            message(role="assistant", tool_calls=[{"type": "function", "function": {"arguments": "{}"}}]),
            "messages[1].tool_calls[0].function.name",
            "missing",
        ),
        (message(role="assistant", tool_calls=[{"type": "mcp"}]), "messages[1].tool_calls[0].type", "mcp"),
        (
            message(role="assistant", reasoning="a", reasoning_content="b", content="c"),
            "messages[1].reasoning",
            "one of them",
        ),
        (message(role="assistant", content="x", **TOKENS), "messages[1]", "partial token bundle"),
        (
            message(role="assistant", content="x", **TOKENS, generation_log_probs=["a"]),
            "messages[1].generation_log_probs[0]",
            "number",
        ),
        (
            message(
                role="assistant",
                content="x",
                tool_calls=[{"function": {"name": "f"}}],
                prompt_token_ids=[1],
                generation_token_ids=[10**6],
                generation_log_probs=[-1.0],
            ),
            "messages[1].generation_token_ids",
            "vocabulary",
        ),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 129}, "n", "1 to 128"),
        ({"n": True}, "n", "1 to 128"),
        ({"max_completion_tokens": 9}, "max_tokens", "one of them"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "greater"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"stop": [""]}, "stop[0]", "characters"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"store": True}, "store", "not stored"),
        ({"functions": []}, "functions", "tools"),
        ({"function_call": "auto"}, "function_call", "tool_choice"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "predicted"),
        ({"modalities": ["text", "audio"]}, "modalities", "text"),
        ({"audio": {"voice": "a", "format": "wav"}}, "audio", "text"),
        ({"web_search_options": {}}, "web_search_options", "search"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "likelier"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"input": "hi"}, "input", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "obfuscated",
        ),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other", "other"),
        ({"verbosity": "high"}, "verbosity", "longer or shorter"),
        ({"verbosity": "loud"}, "verbosity", "medium"),
        ({"reasoning_effort": "eager"}, "reasoning_effort", "medium"),
        ({"metadata": {"a": 1}}, "metadata.a", "text"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "missing",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 7}}}},
            "response_format.json_schema.schema",
            "schema",
        ),
        ({"tools": "all"}, "tools", "list"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "character"),
        ({"tools": [CHAT_TOOL, CHAT_TOOL]}, "tools[1].function.name", "earlier"),
        (
            {
                "tools": [
                    {
                        "type": "custom",
                        "custom": {
                            "name": "run",
                            "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "x"}},
                        },
                    }
                ]
            },
            "tools[0].custom.format",
            "grammar",
        ),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "any", "tools": [CHAT_TOOL]}, "tool_choice", "any"),
        (
            {"tools": [RUN], "tool_choice": {"type": "custom", "custom": {"name": "go"}}},
            "tool_choice.custom.name",
            "none of the tools",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        (
            {
                "tools": [CHAT_TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "any", "tools": [CHAT_TOOL]},
                },
            },
            "tool_choice.allowed_tools.mode",
            "required",
        ),
        (
            {
                "tools": [CHAT_TOOL],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [RUN]}},
            },
            "tool_choice.allowed_tools.tools[0].custom.name",
            "none of the tools",
        ),
    ],
)
async def test_refusals_name_the_chats_own_field(
    chat_url: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = await error_of(f"{chat_url}/chat/completions", {**ASK, **fields})
    assert error["param"] == param, error
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error"
    for foreign in ("text.format", "max_output_tokens", "input["):
        assert foreign not in error["message"]


async def test_a_prompt_that_is_too_long_is_the_messages_fault(chat_url: str) -> None:
    error = await error_of(f"{chat_url}/chat/completions", {"messages": [{**USER, "content": "word " * 600}]})
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


async def test_another_model_is_none(chat_url: str) -> None:
    status, answer = await post(f"{chat_url}/chat/completions", {**ASK, "model": "gpt-9"})
    assert (status, answer["error"]["param"]) == (404, "model")


async def test_only_names_that_tell_apart_are_refused() -> None:
    agents = [{"role": "assistant", "content": "hi", "name": name} for name in ("anna", "anna", "berta")]
    ChatRequest.read({"messages": [USER, *agents[:2]]})
    with pytest.raises(PolicyError, match="apart") as caught:
        ChatRequest.read({"messages": [USER, *agents]})
    assert caught.value.param == "messages[3].name"


async def test_tokens_are_told_as_vllm_tells_them(chat_url: str) -> None:
    """As NeMo Gym's model server asks for them."""
    for streams in (False, True):
        body = {"messages": [USER], "max_tokens": 8, "logprobs": True, "stream": streams}
        body |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{chat_url}/chat/completions", json=body) as answer:
                text = await answer.text()
        if streams:
            chunks = [json.loads(block.removeprefix("data: ")) for block in text.split("\n\n")[:-2]]
            (ending,) = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
            message = ending["delta"]
        else:
            (ending,) = json.loads(text)["choices"]
            message = ending["message"]
            assert json.loads(text)["prompt_token_ids"] == message["prompt_token_ids"]
        ids, scores = message["generation_token_ids"], message["generation_log_probs"]
        assert ending["token_ids"] == ids
        entries = ending["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == [f"token_id:{token}" for token in ids]
        assert [entry["logprob"] for entry in entries] == scores
