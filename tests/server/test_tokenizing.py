"""`/tokenize`, `/detokenize` and `/models/{id}`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI, NotFoundError
from support.agents import CHAT_TOOL, call_text, say_text
from support.operating import Server, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "hi"}


@pytest_asyncio.fixture
async def server(renderer: TemplateRenderer) -> AsyncIterator[Server]:
    engine = ReplayEngine([renderer.encode(text) for text in (call_text("1 + 2"), say_text("It is 3."))])
    async with operated(Policy(engine, renderer)) as server:
        yield server


@pytest.mark.parametrize("root", ["", "/v1"])
async def test_a_text_comes_back(server: Server, renderer: TemplateRenderer, root: str) -> None:
    text = "<|im_start|>user\nnaïve 🙂<|im_end|>"
    answer = await server.ask("POST", f"{root}/tokenize", json={"prompt": text, "return_token_strs": True})
    assert answer.status == 200
    assert answer.body["tokens"] == renderer.encode(text)
    assert answer.body["count"] == len(answer.body["tokens"]) == len(answer.body["token_strs"])
    assert answer.body["max_model_len"] == 100_000
    back = await server.ask("POST", f"{root}/detokenize", json={"tokens": answer.body["tokens"]})
    assert back.body == {"prompt": text}


async def test_messages_are_the_prompt_of_a_chat_completion(server: Server) -> None:
    asked: dict[str, Any] = {"model": "policy", "messages": [USER], "tools": [CHAT_TOOL]}
    for _ in range(2):
        tokenized = await server.ask("POST", "/tokenize", json=asked)
        completion = await server.ask("POST", "/v1/chat/completions", json=asked)
        message = completion.body["choices"][0]["message"]
        assert tokenized.body["tokens"] == message["prompt_token_ids"]
        assert tokenized.body["token_strs"] is None
        echo = {"role": "assistant", "content": message["content"], "tool_calls": message.get("tool_calls")}
        result = {"role": "tool", "content": "3", "tool_call_id": "x"}
        if message.get("tool_calls"):
            result["tool_call_id"] = message["tool_calls"][0]["id"]
            asked = {**asked, "messages": [*asked["messages"], echo, result]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"messages": [USER], "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user"}]}, None),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 100_000]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["1"]}, None),
    ],
)
async def test_bad_bodies_name_the_field(
    server: Server, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = await server.ask("POST", path, json=body)
    assert answer.status == 400
    assert answer.body["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert answer.body["error"]["param"] == param


async def test_another_model_is_not_found(server: Server) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
        answer = await server.ask("POST", path, json={**body, "model": "other"})
        assert (answer.status, answer.code) == (404, "model_not_found")


async def test_the_model_describes_itself(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        (listed,) = (await client.models.list()).data
        assert await client.models.retrieve("policy") == listed
        with pytest.raises(NotFoundError, match="some/other"):
            await client.models.retrieve("some/other")
    assert (await server.ask("GET", "/rollouts/none/v1/models/policy")).status == 404
