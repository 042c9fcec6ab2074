"""`Idempotency-Key`: asked for twice, sampled once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.held import HeldEngine, until
from support.operating import ASK, Answer, Server, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from backends.server.idempotency import IdempotencyLimits
from backends.server.operation import AccessConfig, RequestLimits, serving
from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.schema import ResponseRequest
from gym_sdk.transport import Dispatch
from gym_sdk.transport.http import HttpTransport

pytestmark = pytest.mark.asyncio

RESPONSES = "/v1/responses"
CHAT = {"messages": [{"role": "user", "content": "1 + 2 ="}], "max_tokens": 4}
MESSAGES = {**CHAT, "model": "policy"}
COMPLETION = {"prompt": "1 + 2 =", "max_tokens": 4}


@pytest.fixture
def engine(renderer: TemplateRenderer) -> ReplayEngine:
    return ReplayEngine([renderer.encode(text) for text in ("three", "four", "five", "six", "seven")])


@pytest.fixture
def held(renderer: TemplateRenderer) -> HeldEngine:
    return HeldEngine([renderer.encode(text) for text in ("three", "four", "five")])


async def ask(server: Server, key: str, body: Any = ASK, *, path: str = RESPONSES, **headers: str) -> Answer:
    return await server.ask("POST", path, json=body, headers={"Idempotency-Key": key, **headers})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, ASK),
        ("/v1/chat/completions", CHAT),
        ("/v1/messages", MESSAGES),
        ("/v1/completions", COMPLETION),
    ],
)
async def test_the_same_answer_again(
    engine: ReplayEngine, renderer: TemplateRenderer, path: str, body: Any
) -> None:
    async with operated(Policy(engine, renderer)) as server:
        first = await ask(server, "k", body, path=path)
        again = await ask(server, "k", body, path=path)
        assert (first.status, again.status) == (200, 200)
        assert again.body == first.body
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert len(engine.prompts) == 1
        assert (await ask(server, "other", body, path=path)).body["id"] != first.body["id"]
        without = await server.ask("POST", path, json=body)
        assert without.status == 200
        assert len(engine.prompts) == 3


async def test_whoever_asks_meanwhile_waits_for_the_first(
    held: HeldEngine, renderer: TemplateRenderer
) -> None:
    async with operated(Policy(held, renderer)) as server:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask(server, "k")) for _ in range(5)]
            await until(lambda: repeats(server, "attached") == 4)
            held.release.set()
        assert len({answer.result().body["id"] for answer in asked}) == 1
        assert len(held.prompts) == 1
        assert (await ask(server, "k")).body == asked[0].result().body
        assert repeats(server, "replayed") == 1


def repeats(server: Server, how: str) -> float:
    from backends.server.operation.metrics import METRICS

    registry = server.app[METRICS].registry
    return registry.get_sample_value("gym_http_idempotent_repeats_total", {"how": how}) or 0.0


async def test_a_client_that_goes_ends_its_call_and_frees_the_key(
    held: HeldEngine, renderer: TemplateRenderer
) -> None:
    async with operated(Policy(held, renderer)) as server:
        gone = asyncio.create_task(ask(server, "k"))
        await until(lambda: held.running == 1)
        gone.cancel()
        await until(lambda: held.cancelled == 1)
        held.release.set()
        again = await ask(server, "k", {**ASK, "input": "something else"})
        assert again.status == 200  # even for another request: nothing was sampled for the first
        assert "idempotency-replayed" not in again.headers


async def test_a_client_that_goes_while_another_waits_ends_nothing(
    held: HeldEngine, renderer: TemplateRenderer
) -> None:
    async with operated(Policy(held, renderer)) as server:
        first = asyncio.create_task(ask(server, "k"))
        await until(lambda: held.running == 1)
        second = asyncio.create_task(ask(server, "k"))
        await until(lambda: repeats(server, "attached") == 1)
        first.cancel()
        await asyncio.wait([first])
        third = asyncio.create_task(ask(server, "k"))
        await until(lambda: repeats(server, "attached") == 2)
        second.cancel()
        await asyncio.wait([second])
        held.release.set()
        answer = await third
        assert (answer.status, held.cancelled, len(held.prompts)) == (200, 0, 1)


async def test_another_request_under_the_same_key_is_refused(
    held: HeldEngine, renderer: TemplateRenderer
) -> None:
    async with operated(Policy(held, renderer)) as server:
        first = asyncio.create_task(ask(server, "k"))
        await until(lambda: held.running == 1)
        for done in (False, True):
            if done:
                held.release.set()
                await first
            for body, path in (({**ASK, "temperature": 0.5}, RESPONSES), (CHAT, "/v1/chat/completions")):
                refused = await ask(server, "k", body, path=path)
                assert (refused.status, refused.code) == (422, "idempotency_key_reused")
                assert refused.body["error"]["param"] == "Idempotency-Key"
            other_form = await ask(server, "k", **{"Gym-Token-Form": "compact"})
            assert other_form.code == "idempotency_key_reused"
        assert len(held.prompts) == 1


async def test_failures_are_not_kept(renderer: TemplateRenderer) -> None:
    broken = HeldEngine(
        [renderer.encode("three")], error=TransportError("the engine is gone", retryable=True)
    )
    broken.release.set()
    async with operated(Policy(broken, renderer)) as server:
        assert (await ask(server, "k")).status == 503
        broken._error = None
        assert (await ask(server, "k")).status == 200
        assert (await ask(server, "bad", {"input": "q", "temperature": -1})).status == 400
        assert (await ask(server, "bad", {"input": "q", "max_output_tokens": 0})).status == 400


async def test_all_who_wait_are_told_of_a_failure(renderer: TemplateRenderer) -> None:
    broken = HeldEngine([], error=TransportError("the engine is gone", retryable=True))
    async with operated(Policy(broken, renderer)) as server:
        asked = [asyncio.create_task(ask(server, "k")) for _ in range(3)]
        await until(lambda: repeats(server, "attached") == 2)
        broken.release.set()
        assert [(await answer).status for answer in asked] == [503] * 3


async def test_streams_are_sampled_each_time(engine: ReplayEngine, renderer: TemplateRenderer) -> None:
    async with operated(Policy(engine, renderer)) as server:
        for count in (1, 2):
            answer = await ask(server, "k", {**ASK, "stream": True})
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert b"response.completed" in answer.body or b"response.incomplete" in answer.body
            assert len(engine.prompts) == count
        assert (await ask(server, "k", {**ASK, "stream": False})).status == 200
        assert (await ask(server, "k", {**ASK, "stream": False})).headers["idempotency-replayed"] == "true"


async def test_what_runs_in_the_background_runs_once(
    engine: ReplayEngine, renderer: TemplateRenderer
) -> None:
    async with operated(Policy(engine, renderer)) as server:
        answers = [await ask(server, "k", {**ASK, "background": True}) for _ in range(3)]
        assert {answer.body["status"] for answer in answers} == {"queued"}
        assert len({answer.body["id"] for answer in answers}) == 1


async def test_callers_have_keys_of_their_own(engine: ReplayEngine, renderer: TemplateRenderer) -> None:
    access = AccessConfig(api_keys=("mine", "yours"))
    async with operated(Policy(engine, renderer), access=access) as server:
        mine = await ask(server, "k", **{"x-api-key": "mine"})
        yours = await ask(server, "k", **{"x-api-key": "yours"})
        assert mine.body["id"] != yours.body["id"]
        assert (await ask(server, "k", **{"x-api-key": "neither"})).status == 401


@pytest.mark.parametrize("key", ["", "x" * 256, "ümlaut"])
async def test_keys_that_are_none(engine: ReplayEngine, renderer: TemplateRenderer, key: str) -> None:
    async with operated(Policy(engine, renderer)) as server:
        answer = await ask(server, key)
        assert (answer.status, answer.body["error"]["param"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize(
    "limits",
    [IdempotencyLimits(max_answers=2), IdempotencyLimits(max_bytes=4000), IdempotencyLimits(ttl_s=0.05)],
)
async def test_memory_is_bounded(renderer: TemplateRenderer, limits: IdempotencyLimits) -> None:
    engine = ReplayEngine([renderer.encode("three")] * 40)
    app = make_app(Policy(engine, renderer), idempotency=limits)
    async with serving(app, "127.0.0.1", 0, RequestLimits()) as port:
        server = Server(app, port)
        for number in range(12):
            assert (await ask(server, f"k{number}")).status == 200
        if limits.ttl_s < 1:
            await asyncio.sleep(0.1)
        else:
            assert (await ask(server, "k11")).headers["idempotency-replayed"] == "true"
        sampled = len(engine.prompts)
        assert "idempotency-replayed" not in (await ask(server, "k0")).headers
        assert len(engine.prompts) == sampled + 1


async def test_limits_are_positive() -> None:
    with pytest.raises(ConfigurationError, match="ttl_s"):
        IdempotencyLimits(ttl_s=0)


async def test_our_client_samples_once_although_its_connection_breaks(
    held: HeldEngine, renderer: TemplateRenderer
) -> None:
    """The second try is there before the server knows that the first one is gone, and takes its place."""
    async with operated(Policy(held, renderer)) as server:
        transport = HttpTransport(f"{server.url}/v1")
        await transport.open()
        dispatch = Dispatch([transport])
        try:
            request = ResponseRequest(input="1 + 2 =", max_output_tokens=4)
            lost = asyncio.create_task(dispatch.respond(request, request_id="call"))
            await until(lambda: held.running == 1)
            tried = asyncio.create_task(dispatch.respond(request, request_id="call"))
            await until(lambda: repeats(server, "attached") == 1)
            lost.cancel()
            await asyncio.wait([lost])
            held.release.set()
            assert (await tried).response.status in ("completed", "incomplete")
            assert (held.cancelled, len(held.prompts)) == (0, 1)
        finally:
            await dispatch.aclose()
            await transport.aclose()
