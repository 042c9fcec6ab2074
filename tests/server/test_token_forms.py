"""Where the tokens stand on the wire: on the last item, on the response, or only what is new."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.replay import ReplayEngine

from backends.memory import CallMemory
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from gym_sdk import GymClient, Retry, Sampling, Task, tool
from gym_sdk.errors import PolicyError, TokenContractError
from gym_sdk.schema import (
    TOKEN_FIELDS,
    TOKEN_FORM_HEADER,
    Outcome,
    Response,
    ResponseRequest,
    Rollout,
    TokenForm,
)
from gym_sdk.transport.http import HttpTransport

pytestmark = pytest.mark.asyncio

CALL = '<tool_call>\n{ "name":"double", "arguments":{"x":%d}}\n</tool_call><|im_end|>'


@tool
def double(x: int) -> int:
    """Double a number."""
    return 2 * x


@pytest.fixture(scope="module")
def renderer(untrained_policy: Path) -> TemplateRenderer:
    return TemplateRenderer.from_folder(untrained_policy)


Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serve(renderer: TemplateRenderer) -> Serve:
    """Return what serves a policy that says these texts, and counts what travels."""

    @asynccontextmanager
    async def serving(policy: Policy, **options: Any) -> AsyncIterator[str]:
        runner = web.AppRunner(make_app(policy, **options), handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()
            await policy.aclose()

    return serving


@pytest.fixture
def make_policy(renderer: TemplateRenderer) -> Callable[..., Policy]:
    def make(*says: str, max_tokens: int = 10**6) -> Policy:
        engine = ReplayEngine([renderer.encode(text) for text in says], context_length=100_000)
        return Policy(engine, renderer, memory=CallMemory(max_tokens))

    return make


class Counting(HttpTransport):
    """Notes the bodies that travel."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.sent: list[bytes] = []
        self.received: list[bytes] = []

    async def _ask(self, request: ResponseRequest, *options: Any) -> bytes:
        answer = await super()._ask(request, *options)
        self.sent.append(request.to_wire_json())
        self.received.append(answer)
        return answer


async def roll(url: str, form: TokenForm, **options: Any) -> tuple[Rollout, Counting]:
    transport = Counting(url)
    retry = Retry(attempts=1)
    async with GymClient.over(transport, model="policy", retry=retry, token_form=form) as client:
        task = Task("double it", instructions="Be brief.", **options)
        sampling = Sampling(max_output_tokens=200)
        return await client.rollout(task, tools=[double], sampling=sampling), transport


async def respond(url: str, form: str | None, path: str = "responses") -> dict[str, Any]:
    headers = {} if form is None else {TOKEN_FORM_HEADER: form}
    message = {"role": "user", "content": "q"}
    body = {"input": [message]} if path == "responses" else {"messages": [message]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/{path}", json=body, headers=headers) as answer,
    ):
        found: dict[str, Any] = await answer.json()
        return found


@pytest.mark.parametrize("by", ["header", "default"])
@pytest.mark.parametrize("form", ["item", "response", "compact"])
async def test_each_form_says_the_same(serve: Serve, make_policy: Any, form: TokenForm, by: str) -> None:
    options = {"token_form": form} if by == "default" else {}
    async with serve(make_policy("yes<|im_end|>", "yes<|im_end|>"), **options) as url:
        body = await respond(url, form if by == "header" else None)
        reference = Response.model_validate(await respond(url, "item")).tokens
    assert Response.model_validate(body).tokens == reference
    on_item = {name for item in body["output"] for name in TOKEN_FIELDS if name in item}
    on_response = {name for name in TOKEN_FIELDS if name in body}
    assert bool(on_item) == (form == "item")
    assert bool(on_response) == (form == "response")
    assert ("token_delta" in body) == (form == "compact")


async def test_an_unknown_form_is_refused_by_name(serve: Serve, make_policy: Any) -> None:
    async with serve(make_policy("yes<|im_end|>")) as url:
        body = await respond(url, "zip")
    assert body["error"]["param"] == TOKEN_FORM_HEADER
    assert "item, response, compact" in body["error"]["message"]


async def test_chat_completions_carry_tokens_on_the_message(serve: Serve, make_policy: Any) -> None:
    async with serve(make_policy("yes<|im_end|>"), token_form="compact") as url:
        body = await respond(url, None, "chat/completions")
    assert body["choices"][0]["message"]["generation_token_ids"]


@pytest.mark.parametrize("form", ["item", "response", "compact"])
async def test_rollouts_are_the_same_in_each_form(serve: Serve, make_policy: Any, form: TokenForm) -> None:
    policy = make_policy(CALL % 1, CALL % 2, "It is 4.<|im_end|>")
    async with serve(policy) as url:
        rollout, transport = await roll(url, form)
    assert rollout.outcome is Outcome.COMPLETED
    assert [item.type for item in rollout.items].count("function_call_output") == 2
    assert len(rollout.sequences()) == 1
    assert rollout.metrics.get("forks", 0) == rollout.metrics.get("unreported_forks", 0) == 0
    echoed = [body.count(b"generation_token_ids") for body in transport.sent]
    assert echoed == ([0, 1, 2] if form == "item" else [0, 0, 0])
    # stored as a chain, whatever travelled
    first, second, third = (call.tokens for call in rollout.model_calls)
    assert first is not None
    assert second is not None
    assert third is not None
    assert third.parent is second
    assert second.parent is first
    assert len(transport.sent) == 3


async def test_compact_moves_each_token_and_item_once(serve: Serve, make_policy: Any) -> None:
    calls = 12
    policy = make_policy(*[CALL % 1] * calls, "done<|im_end|>")
    async with serve(policy) as url:
        rollout, transport = await roll(url, "compact")
    assert len(rollout.model_calls) == calls + 1
    sent, received = [len(body) for body in transport.sent], [len(body) for body in transport.received]
    # the first request has the task, tools and instructions; those after it only what is new
    assert max(sent[1:]) - min(sent[1:]) < 20
    assert max(received[1:calls]) - min(received[1:calls]) < 20
    assert b"Be brief" not in transport.sent[1]
    assert b"tools" not in transport.sent[1]
    assert b"Be brief" not in b"".join(transport.received)


async def test_a_server_that_lost_the_state_is_told_everything_once(
    serve: Serve, make_policy: Any, renderer: TemplateRenderer
) -> None:
    class Forgetful(CallMemory):
        """Forgets everything before the third request."""

        asked = 0

        def named(self, name: str) -> Any:
            type(self).asked += 1
            return None if self.asked == 2 else super().named(name)

    says = [CALL % 1, CALL % 2, CALL % 3, "It is 4.<|im_end|>"]
    engine = ReplayEngine([renderer.encode(text) for text in says])
    policy = Policy(engine, renderer, memory=Forgetful())
    async with serve(policy) as url:
        rollout, transport = await roll(url, "compact")
    assert rollout.outcome is Outcome.COMPLETED
    assert rollout.metrics["lost_states"] == 1
    assert len(rollout.sequences()) == 1
    assert rollout.metrics.get("forks", 0) == 0
    assert [b"previous_response_id" in body for body in transport.sent] == [False, True, False, True]
    assert b"generation_token_ids" in transport.sent[2]


async def test_a_restarted_server_proves_the_tokens_that_it_is_sent(
    serve: Serve, make_policy: Any, renderer: TemplateRenderer
) -> None:
    """The whole policy is new: nothing is remembered, everything is proven from the items."""
    policies = [make_policy(CALL % 1), make_policy(CALL % 2, "It is 4.<|im_end|>")]

    class Switching(Policy):
        async def respond(self, request: Any, **options: Any) -> Response:
            policy = policies[0] if policies[0].stats.responses == 0 else policies[1]
            return await policy.respond(request, **options)

    async with serve(Switching(ReplayEngine([]), renderer)) as url:
        rollout, _ = await roll(url, "compact")
    assert rollout.metrics["lost_states"] == 1
    assert policies[1].stats.forks == 0
    assert len(rollout.sequences()) == 1


async def test_a_delta_to_an_unknown_response_is_a_typed_error() -> None:
    delta = {
        "extends": "resp_x",
        "new_prompt_token_ids": [1],
        "generation_token_ids": [2],
        "generation_log_probs": [-1.0],
    }
    response = Response(id="r", created_at=0.0, model="m", output=[], token_delta=delta)  # type: ignore[arg-type]
    with pytest.raises(TokenContractError, match="names response 'resp_x'"):
        _ = response.tokens
    wrong = {**delta, "extends": None, "generation_log_probs": []}
    response = Response(id="r", created_at=0.0, model="m", output=[], token_delta=wrong)  # type: ignore[arg-type]
    with pytest.raises(TokenContractError, match="0 entries for 1"):
        _ = response.tokens


async def test_a_refusal_that_is_no_lost_state_is_not_tried_again(serve: Serve, make_policy: Any) -> None:
    policy = make_policy(CALL % 1)
    async with serve(policy) as url:
        rollout, transport = await roll(url, "compact", settings={"no_such_field": 1})
    assert rollout.outcome is Outcome.FAILED
    assert rollout.failure is not None
    assert rollout.failure.error == PolicyError.__name__
    assert transport.sent == []
