"""The HTTP server over the real embedded engine: routes, errors, unmodified clients."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from support.replay import ReplayEngine

from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.server import make_app
from backends.transformers import TransformersEngine
from gym_sdk import GymClient
from gym_sdk.errors import ContextOverflowError, DeadlineError, PolicyError, TransportError
from gym_sdk.schema import Response

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "1 + 2 ="}
TOOL = {
    "type": "function",
    "name": "calculator",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
}


@pytest_asyncio.fixture
async def policy(untrained_policy: Path) -> AsyncIterator[Policy]:
    policy = load_policy(PolicyConfig(model=str(untrained_policy), context_length=256))
    yield policy
    await policy.aclose()


@pytest_asyncio.fixture
async def url(policy: Policy) -> AsyncIterator[str]:
    async with TestServer(make_app(policy), handler_cancellation=True) as server:
        yield str(server.make_url("/v1"))


async def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(url, data=data) as answer:
        return answer.status, await answer.json()


async def test_responses_carry_the_exact_tokens(url: str, policy: Policy) -> None:
    status, body = await post(f"{url}/responses", {"input": [USER], "max_output_tokens": 8, "seed": 1})
    assert status == 200
    response = Response.model_validate(body)
    assert response.tokens is not None
    assert policy.renderer.decode(response.tokens.prompt_token_ids).startswith("<|im_start|>user\n1 + 2 =")
    assert 1 <= len(response.tokens.generation_token_ids) <= 8
    assert len(response.tokens.generation_log_probs) == len(response.tokens.generation_token_ids)
    assert [span.version for span in response.tokens.weight_versions] == ["0"]
    assert body["usage"]["output_tokens"] == len(response.tokens.generation_token_ids)
    _, again = await post(f"{url}/responses", {"input": [USER], "max_output_tokens": 8, "seed": 1})
    assert Response.model_validate(again).tokens == response.tokens


async def test_a_second_turn_extends_the_first(url: str) -> None:
    async with GymClient(url, model="policy") as client:
        first = await client.respond([USER], max_output_tokens=8)
        items = [USER, *first.output, {"role": "user", "content": "and 3?"}]
        second = await client.respond(items, max_output_tokens=8)
    assert first.tokens is not None
    assert second.tokens is not None
    known = first.tokens.token_ids
    assert second.tokens.prompt_token_ids[: len(known)] == known
    assert second.fork is None


async def test_chat_completions_carry_them_too(url: str) -> None:
    body = {"model": "policy", "messages": [USER], "max_tokens": 8, "seed": 1, "temperature": 1}
    status, completion = await post(f"{url}/chat/completions", body)
    assert status == 200
    choice = completion["choices"][0]
    message = choice["message"]
    _, response = await post(f"{url}/responses", {"input": [USER], "max_output_tokens": 8, "seed": 1})
    tokens = Response.model_validate(response).tokens
    assert tokens is not None
    assert message["prompt_token_ids"] == tokens.prompt_token_ids
    assert message["generation_token_ids"] == tokens.generation_token_ids
    assert message["generation_log_probs"] == pytest.approx(tokens.generation_log_probs)
    assert choice["finish_reason"] in ("stop", "length", "tool_calls")

    messages = [USER, message, {"role": "user", "content": "and 3?"}]
    _, second = await post(f"{url}/chat/completions", {**body, "messages": messages})
    known = tokens.token_ids
    assert second["choices"][0]["message"]["prompt_token_ids"][: len(known)] == known


async def test_tools_and_tool_results_in_chat(url: str, policy: Policy) -> None:
    function = {"name": "calculator", "parameters": TOOL["parameters"]}
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "1"}'},
    }
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        ],
        "tools": [{"type": "function", "function": function}],
        "max_completion_tokens": 4,
    }
    status, completion = await post(f"{url}/chat/completions", body)
    assert status == 200
    prompt = policy.renderer.decode(completion["choices"][0]["message"]["prompt_token_ids"])
    assert "calculator(expression)" in prompt
    assert "<tool_response>\n3\n</tool_response>" in prompt


async def test_models_and_health(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/models") as answer:
            models = await answer.json()
        async with session.get(f"{url.removesuffix('/v1')}/health") as answer:
            health = await answer.json()
    assert [model["id"] for model in models["data"]] == ["policy"]
    assert (health["status"], health["weight_version"], health["running"]) == ("ok", "0", 0)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("responses", b"{not json", 400, None, "not JSON"),
        ("responses", [1], 400, None, "JSON object"),
        ("responses", {}, 400, "input", "required"),
        ("responses", {"input": [USER], "temperature": -1}, 400, "temperature", "greater than or equal"),
        ("responses", {"input": [{"content": "x"}]}, 400, "input[0]", "needs a `type`"),
        ("responses", {"input": [{**USER, "role": "pirate"}]}, 400, "input[0].role", "'user'"),
        ("responses", {"input": [USER], "model": "gpt-9"}, 404, "model", "serves 'policy'"),
        ("responses", {"input": [USER], "tool_choice": "required"}, 400, "tool_choice", "no tools"),
        (
            "responses",
            {"input": [{**USER, "role": "assistant", "prompt_token_ids": [1]}]},
            400,
            "input[0]",
            "partial token bundle",
        ),
        ("responses", {"input": "many words " * 300}, 400, "input", "the context holds 256"),
        ("responses", {"input": "many words " * 30_000}, 400, "input", "the context holds 256"),
        ("responses", {"input": [USER], "top_k": 2**63}, 400, "top_k", "less than or equal"),
        ("chat/completions", {"messages": [USER], "top_k": 2**63}, 400, "top_k", "less than or equal"),
        ("completions", {"prompt": "q", "top_k": 2**63}, 400, "top_k", "less than or equal"),
        ("completions", {"prompt": "many words " * 30_000}, 400, "prompt", "the context holds 256"),
        (
            "responses",
            {"input": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "name": {}}},
            400,
            "tool_choice.name",
            "none of the tools",
        ),
        ("chat/completions", {"messages": []}, 400, "messages", "at least one"),
        ("chat/completions", {"messages": [USER], "n": 0}, 400, "n", "whole number"),
        ("chat/completions", {"messages": [{"role": "tool"}]}, 400, "messages[0].tool_call_id", "missing"),
        ("chat/completions", {"messages": [{"role": "pirate"}]}, 400, "messages[0].role", "pirate"),
        ("nowhere", {}, 404, None, "Not Found"),
    ],
)
async def test_errors_have_openais_shape_and_name_the_field(
    url: str, path: str, body: Any, status: int, param: str | None, says: str
) -> None:
    found, answer = await post(f"{url}/{path}", body)
    assert found == status
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"]


async def test_unknown_fields_of_weight_versions_are_left_aside(url: str) -> None:
    body = {"input": [USER], "max_output_tokens": 4}
    _, first = await post(f"{url}/responses", body)
    last = first["output"][-1]
    for span in last["weight_versions"]:
        span["more"] = 1
    status, second = await post(f"{url}/responses", {**body, "input": [USER, *first["output"], USER]})
    assert status == 200
    prompt = second["output"][-1]["prompt_token_ids"]
    tokens = last["prompt_token_ids"] + last["generation_token_ids"]
    assert prompt[: len(tokens)] == tokens


async def test_an_engine_that_broke_is_not_healthy(url: str, policy: Policy) -> None:
    assert isinstance(policy.engine, TransformersEngine)
    root = url.removesuffix("/v1")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{root}/health") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "ok")
        policy.engine._scheduler.step = None  # type: ignore[method-assign, assignment]
        status, answered = await post(f"{url}/responses", {"input": [USER]})
        assert (status, answered["error"]["type"]) == (500, "server_error")
        async with session.get(f"{root}/health") as answer:
            body = await answer.json()
            assert (answer.status, body["status"]) == (503, "broken")
            assert "the engine broke" in body["problem"]


async def test_our_client_raises_typed_errors(url: str) -> None:
    async with GymClient(url, model="policy") as client:
        with pytest.raises(ContextOverflowError, match="the context holds 256"):
            await client.respond("many words " * 300)
        with pytest.raises(PolicyError) as caught:
            await client.respond("q", tool_choice="required")
        assert (caught.value.status, caught.value.param) == (400, "tool_choice")


async def test_a_client_that_goes_away_frees_its_slot(url: str, policy: Policy) -> None:
    async with GymClient(url, model="policy") as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.gather(*(client.respond("q " * n) for n in range(1, 20)))
    for _ in range(200):
        if policy.engine.info.running + policy.engine.info.waiting == 0:
            break
        await asyncio.sleep(0.02)
    assert policy.engine.info.running + policy.engine.info.waiting == 0


async def test_weights_are_replaced_over_http(url: str, policy: Policy, untrained_policy: Path) -> None:
    async with GymClient(url, model="policy") as client:
        await client.update_weights(untrained_policy, version="7")
        response = await client.respond("q", max_output_tokens=2)
        assert response.tokens is not None
        assert [span.version for span in response.tokens.weight_versions] == ["7"]
        with pytest.raises(PolicyError, match="missing"):
            await client.update_weights("/no/such/missing/folder", version="8")
        assert policy.engine.info.weight_version == "7"
    root = url.removesuffix("/v1")
    for path, body, param in [
        ("update_weights_from_disk", {"weight_version": "1"}, "model_path"),
        ("update_weights_from_disk", {"model_path": "x"}, "weight_version"),
        ("pause_generation", {"mode": "nap"}, "mode"),
        ("abort_request", {}, "abort_all"),
    ]:
        status, answer = await post(f"{root}/{path}", body)
        assert (status, answer["error"]["param"]) == (400, param)


async def test_pause_holds_requests_until_it_ends(url: str) -> None:
    root = url.removesuffix("/v1")
    async with GymClient(url, model="policy") as client:
        assert (await post(f"{root}/pause_generation", {"mode": "in_place"}))[0] == 200
        waiting = asyncio.create_task(client.respond("q", max_output_tokens=2))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert (await post(f"{root}/continue_generation", {}))[0] == 200
        assert (await asyncio.wait_for(waiting, 10)).tokens is not None
        assert (await post(f"{root}/abort_request", {"abort_all": True}))[1]["aborted"] == 0


async def test_the_openai_package_works_unmodified(url: str) -> None:
    async with GymClient(url, model="policy") as client, client.openai() as openai:
        response = await openai.responses.create(
            model="policy",
            input=[USER],  # type: ignore[list-item]
            tools=[{**TOOL, "strict": False}],  # type: ignore[list-item]
            max_output_tokens=8,
        )
        assert response.output[-1].generation_token_ids  # type: ignore[union-attr]
        completion = await openai.chat.completions.create(
            model="policy",
            messages=[USER],  # type: ignore[list-item]
            max_tokens=8,
        )
        assert completion.choices[0].message.generation_token_ids  # type: ignore[attr-defined]
        assert [model.id async for model in openai.models.list()] == ["policy"]


OLD_CLIENT = """
import asyncio, sys, openai
from openai.types.responses import Response
from gym_sdk.schema import as_items

async def main(url):
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    first = await client.responses.create(model="policy", input="1 + 2 =", max_output_tokens=8)
    Response.model_validate(first.model_dump())
    # the package's own objects go back as they are
    history = [{"role": "user", "content": "1 + 2 ="}, *first.output, {"role": "user", "content": "and?"}]
    items = as_items(history)
    assert items[1].tokens is not None
    second = await client.responses.create(
        model="policy", input=[item.to_wire() for item in items], max_output_tokens=8
    )
    known = first.output[-1].prompt_token_ids + first.output[-1].generation_token_ids
    assert second.output[-1].prompt_token_ids[: len(known)] == known
    print(openai.__version__)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("version", ["2.8.0", "installed"])
async def test_both_generations_of_the_openai_package(url: str, version: str) -> None:
    """The oldest openai package that is supported, and the one that is installed, each in its own process."""
    environment = {"PATH": "/usr/bin:/bin"}
    if version == "2.8.0":
        folder = Path(sys.prefix) / "openai-2.8.0"
        assert folder.is_dir(), "openai 2.8.0 is not beside the environment; `make test` puts it there"
        environment["PYTHONPATH"] = str(folder)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", OLD_CLIENT, url],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if version == "2.8.0":
        assert done.stdout.strip() == "2.8.0"
    else:
        assert int(done.stdout.split(".")[0]) >= 3


async def test_responses_fit_openais_own_models(url: str) -> None:
    from openai.types.chat import ChatCompletion
    from openai.types.responses import Response as OpenAIResponse

    _, body = await post(f"{url}/responses", {"input": [USER], "tools": [TOOL], "max_output_tokens": 4})
    parsed = OpenAIResponse.model_validate(body)
    assert parsed.output[-1].type in ("message", "function_call", "reasoning")
    _, body = await post(f"{url}/chat/completions", {"messages": [USER], "max_tokens": 4})
    ChatCompletion.model_validate(body)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TransportError("the engine is not there", retryable=True), 503),
        (TransportError("the engine answers nonsense", retryable=False), 502),
        (DeadlineError("the generation", seconds=1.0), 504),
        (RuntimeError("a bug"), 500),
    ],
)
async def test_an_engine_in_another_process_that_fails_is_the_servers_failure(
    policy: Policy, error: Exception, status: int
) -> None:
    class Failing(ReplayEngine):
        async def generate(self, request: Any) -> Any:
            raise error

    failing = Policy(Failing([]), policy.renderer)
    async with TestServer(make_app(failing)) as server:
        found, body = await post(str(server.make_url("/v1/responses")), {"input": [USER]})
    assert found == status
    assert body["error"]["type"] == "server_error"
    assert str(error) in body["error"]["message"]
