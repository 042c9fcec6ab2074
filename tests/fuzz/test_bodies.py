"""Bodies that are almost right: never a 5xx, always an error that a client can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from support.fuzzing import Target, check, fuzz_settings
from support.mutants import Seeds, mutants

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FUNCTION = {"name": "add", "description": "Adds.", "parameters": _SCHEMA, "strict": False}
_CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
_SAMPLED = {
    "role": "assistant",
    "content": "3",
    "prompt_token_ids": [5, 6],
    "generation_token_ids": [7],
    "generation_log_probs": [-0.5],
    "weight_versions": [{"version": "0", "start": 0, "end": 1}],
}
_CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}

RESPONSES: list[Mapping[str, Any]] = [
    {"input": "1 + 2 =", "max_output_tokens": 2},
    {"input": "1 + 2 =", "max_output_tokens": 2, "stream": True, "temperature": 0.5, "top_p": 0.9},
    {
        "model": "policy",
        "instructions": "Add.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "1 + 2 ="}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
            _CALL,
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "3", "annotations": []}]},
            {"type": "message", "role": "user", "content": "and?"},
        ],
        "tools": [{"type": "function", **_FUNCTION}, {"type": "custom", "name": "say"}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "max_output_tokens": 3,
        "metadata": {"a": "b"},
        "store": False,
    },
    {
        "input": "1",
        "max_output_tokens": 8,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": _SCHEMA, "strict": True}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "truncation": "auto",
        "seed": 1,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    },
    {
        "input": "1",
        "max_output_tokens": 4,
        "tools": [{"type": "function", **_FUNCTION}],
        "tool_choice": {"type": "function", "name": "add"},
        "max_tool_calls": 1,
        "stop": ["9"],
        "reasoning": {"effort": "low"},
        "previous_response_id": None,
    },
    {"input": [{"role": "user", "content": "1"}, _SAMPLED], "max_output_tokens": 2},
]
CHAT: list[Mapping[str, Any]] = [
    {"messages": [{"role": "user", "content": "1 + 2 ="}], "max_tokens": 2},
    {
        "model": "policy",
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": [{"type": "text", "text": "1 + 2 ="}]},
            {"role": "assistant", "content": None, "tool_calls": [_CHAT_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "user", "content": "and?"},
        ],
        "tools": [{"type": "function", "function": _FUNCTION}],
        "tool_choice": "auto",
        "max_completion_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 2,
        "seed": 1,
        "stop": ["9", "8"],
    },
    {
        "messages": [{"role": "user", "content": "1"}],
        "max_tokens": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0.5,
        "frequency_penalty": 0,
        "metadata": {"a": "b"},
    },
]
COMPLETIONS: list[Mapping[str, Any]] = [
    {"prompt": "1 + 2 =", "max_tokens": 2, "echo": True},
    {"prompt": [5, 6, 7], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    {
        "model": "policy",
        "prompt": ["1 +", [5, 6]],
        "max_tokens": 3,
        "n": 2,
        "best_of": 2,
        "logprobs": 2,
        "stop": "9",
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "suffix": None,
    },
]
MESSAGES: list[Mapping[str, Any]] = [
    {"model": "policy", "max_tokens": 2, "messages": [{"role": "user", "content": "1 + 2 ="}]},
    {
        "model": "policy",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "Add.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1 + 2 ="}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "hm"},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "3"}]},
        ],
        "tools": [{"name": "add", "description": "Adds.", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
        "stream": True,
        "stop_sequences": ["9"],
        "temperature": 0.5,
        "top_k": 5,
        "metadata": {"user_id": "u"},
    },
]
_MORE = [
    *(
        "stream",
        "n",
        "logprobs",
        "top_logprobs",
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "temperature",
        "top_p",
    ),
    *("top_k", "store", "background", "conversation", "previous_response_id", "include", "metadata", "user"),
    *(
        "response_format",
        "text",
        "reasoning",
        "reasoning_effort",
        "thinking",
        "system",
        "instructions",
        "logit_bias",
    ),
    *("max_output_tokens", "max_tokens", "max_completion_tokens", "max_tool_calls", "chat_template_kwargs"),
    *(
        "stream_options",
        "truncation",
        "prompt",
        "functions",
        "service_tier",
        "stop_sequences",
        "suffix",
        "echo",
    ),
]

SURFACES = [
    Seeds("/v1/responses", RESPONSES, _MORE),
    Seeds("/v1/chat/completions", CHAT, _MORE),
    Seeds("/v1/completions", COMPLETIONS, _MORE),
    Seeds("/v1/messages", MESSAGES, _MORE),
]


@pytest.mark.parametrize("seeds", SURFACES, ids=str)
def test_the_bodies_that_are_changed_are_right(server: Target, seeds: Seeds) -> None:
    for body in seeds.bodies:
        answer = server.ask("POST", seeds.path, json.dumps(body).encode())
        assert answer.status == 200, answer.data
        check(seeds.path, answer)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SURFACES, ids=str)
def test_what_is_almost_right_is_answered_or_refused(server: Target, seeds: Seeds) -> None:
    @fuzz_settings(300)
    @given(data=mutants(seeds))
    def attack(data: bytes) -> None:
        check(seeds.path, server.ask("POST", seeds.path, data))

    attack()
    server.check_health()


_LARGE = "a" * 10_000_000
_LONG = "a b " * 50_000
_HI = [{"role": "user", "content": "hi"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "user", "metadata", "stop", "tool_choice", "seed", "unknown"])
@pytest.mark.parametrize("seeds", SURFACES, ids=str)
def test_ten_megabytes_in_a_field_are_answered_or_refused(server: Target, seeds: Seeds, name: str) -> None:
    check(seeds.path, server.ask("POST", seeds.path, json.dumps({**seeds.bodies[0], name: _LARGE}).encode()))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": _LONG}),
        ("/v1/responses", {"input": "hi", "instructions": _LONG, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": _LONG}]}),
        ("/v1/completions", {"prompt": _LONG}),
        ("/v1/messages", {"model": "policy", "max_tokens": 1, "messages": _HI, "system": _LONG}),
    ],
)
def test_prompts_beyond_the_context_are_refused(server: Target, path: str, body: dict[str, Any]) -> None:
    answer = server.ask("POST", path, json.dumps(body).encode())
    assert answer.status == 400
    check(path, answer)
