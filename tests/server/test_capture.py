"""The capture routes: begin, record, read, end; bounded, isolated, honest about what went wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from support.agents import call_text, say_text
from support.capturing import Serve
from support.held import HeldEngine, until

from backends.rendering import TemplateRenderer
from backends.server.capture import CaptureLimits
from gym_sdk.capture.calls import CapturePage, restore
from gym_sdk.errors import ConfigurationError

USER = {"role": "user", "content": "hi"}


class Http:
    """Speaks to the server's root."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.root = url.removesuffix("/v1")

    async def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        async with self.session.request(method, self.root + path, json=body) as answer:
            return answer.status, await answer.json()


@pytest.mark.asyncio
async def test_calls_are_recorded_and_read_in_increments(serve: Serve, renderer: TemplateRenderer) -> None:
    url = await serve([call_text("1 + 2"), say_text("three"), say_text("again")])
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        assert (await http("POST", "/rollouts/r1"))[0] == 201
        body = {"input": [USER], "instructions": "Be brief."}
        _, first = await http("POST", "/rollouts/r1/v1/responses", body)
        call = first["output"][0]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "3"}
        await http("POST", "/rollouts/r1/v1/responses", {**body, "input": [USER, call, output]})
        status, page = await http("GET", "/rollouts/r1")
        assert (status, page["id"], page["next"], page["more"], page["in_flight"]) == (200, "r1", 2, False, 0)
        # what a call shares with an earlier one is not stored again
        assert page["calls"][1]["input_base"] == [0, 1]
        assert [item["type"] for item in page["calls"][1]["input"]] == [
            "function_call",
            "function_call_output",
        ]
        assert page["calls"][1]["prompt_base"] == 0
        chat = {"messages": [USER], "temperature": 0.5, "max_tokens": 7}
        await http("POST", "/rollouts/r1/v1/chat/completions", chat)
        assert (await http("POST", "/rollouts/r1/v1/responses", {"input": [USER], "n": 3}))[0] == 400
        _, models = await http("GET", "/rollouts/r1/v1/models")
        assert models["data"][0]["id"] == "policy"
        _, rest = await http("DELETE", "/rollouts/r1?after=2")
        assert (await http("GET", "/rollouts/r1"))[0] == 404
    pages = [CapturePage.model_validate(entry) for entry in (page, rest)]
    calls = restore([call for entry in pages for call in entry.calls])
    assert [entry.status for entry in calls] == ["completed", "completed", "completed", "refused"]
    assert [entry.route for entry in calls] == ["responses", "responses", "chat/completions", "responses"]
    assert [len(entry.input) for entry in calls] == [1, 3, 1, 1]
    assert calls[0].instructions == "Be brief."
    assert calls[0].tokens is not None
    assert calls[1].tokens is not None
    assert calls[0].tokens.prompt_token_ids == call["prompt_token_ids"]
    assert calls[1].tokens.prompt_token_ids[: len(calls[0].tokens.token_ids)] == calls[0].tokens.token_ids
    assert calls[2].sampling == {"temperature": 0.5, "max_output_tokens": 7}
    assert calls[3].error is not None
    assert (calls[3].error.status, calls[3].error.param) == (400, "n")
    assert all(entry.duration_s > 0 for entry in calls)


@pytest.mark.asyncio
async def test_pages_are_bounded(serve: Serve) -> None:
    url = await serve([say_text(f"turn {n}") for n in range(5)], captures=CaptureLimits(page_bytes=1))
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        await http("POST", "/rollouts/r")
        for n in range(5):
            await http("POST", "/rollouts/r/v1/responses", {"input": f"q{n}"})
        seen = 0
        while True:
            _, page = await http("GET", f"/rollouts/r?after={seen}")
            assert len(page["calls"]) == 1
            seen = page["next"]
            if not page["more"]:
                break
        assert seen == 5
        assert (await http("GET", "/rollouts/r?after=5"))[1]["calls"] == []
        assert (await http("GET", "/rollouts/r?after=-1"))[0] == 400
        _, rest = await http("DELETE", "/rollouts/r?after=1")
        assert [json.dumps(call["number"]) for call in rest["calls"]] == ["1", "2", "3", "4"]


@pytest.mark.asyncio
async def test_ids_that_are_unknown_in_use_or_malformed(serve: Serve) -> None:
    url = await serve()
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        for method, path in [("POST", "/v1/responses"), ("GET", "/v1/models"), ("GET", ""), ("DELETE", "")]:
            status, body = await http(method, f"/rollouts/nobody{path}", {"input": "q"})
            assert status == 404
            assert body["error"]["code"] == "capture_not_found"
            assert "begin it with POST /rollouts/nobody" in body["error"]["message"]
            assert "3600 s" in body["error"]["message"]
        assert (await http("POST", "/rollouts/twice"))[0] == 201
        status, body = await http("POST", "/rollouts/twice")
        assert (status, body["error"]["code"]) == (409, "capture_exists")
        assert (await http("POST", "/rollouts/not%20an%20id"))[0] == 400


@pytest.mark.asyncio
async def test_captures_that_nobody_uses_are_dropped(serve: Serve, renderer: TemplateRenderer) -> None:
    engine = HeldEngine([renderer.encode(say_text("late"))])
    url = await serve(engine=engine, captures=CaptureLimits(ttl_s=0.2, max_captures=2))
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        for name in ("idle", "busy"):
            assert (await http("POST", f"/rollouts/{name}"))[0] == 201
        status, body = await http("POST", "/rollouts/third")
        assert (status, body["error"]["code"]) == (503, "too_many_captures")
        assert "unused for 0.2 s" in body["error"]["message"]
        call = asyncio.create_task(http("POST", "/rollouts/busy/v1/responses", {"input": "q"}))
        await asyncio.sleep(0.5)
        # swept without anybody asking; a call in flight keeps its capture
        assert (await http("GET", "/health"))[1]["captures"] == 1
        assert (await http("GET", "/rollouts/idle"))[0] == 404
        engine.release.set()
        assert (await call)[0] == 200
        assert (await http("GET", "/rollouts/busy"))[1]["next"] == 1


@pytest.mark.asyncio
async def test_the_number_of_calls_is_bounded(serve: Serve) -> None:
    url = await serve([say_text("one")], captures=CaptureLimits(max_calls=1))
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        await http("POST", "/rollouts/r")
        assert (await http("POST", "/rollouts/r/v1/responses", {"input": "q"}))[0] == 200
        status, body = await http("POST", "/rollouts/r/v1/responses", {"input": "q"})
        assert (status, body["error"]["code"]) == (400, "capture_full")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.asyncio
async def test_the_end_aborts_what_is_in_flight(serve: Serve, stream: bool) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine)
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        await http("POST", "/rollouts/r")

        async def ask() -> tuple[int, str]:
            body = {"input": "q", "stream": stream}
            async with session.post(f"{http.root}/rollouts/r/v1/responses", json=body) as answer:
                return answer.status, await answer.text()

        call = asyncio.create_task(ask())
        await until(lambda: engine.running == 1)
        if stream:
            await asyncio.sleep(0.1)  # past the opening
        assert (await http("GET", "/rollouts/r"))[1]["in_flight"] == 1
        status, page = await http("DELETE", "/rollouts/r")
        assert (status, page["in_flight"]) == (200, 0)
        assert [entry["status"] for entry in page["calls"]] == ["cancelled"]
        assert page["calls"][0]["input"][0]["content"] == "q"
        status, text = await call
        assert status == (200 if stream else 404)
        assert "the capture ended" in text
        assert ("response.failed" in text) is stream
        assert engine.cancelled == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.asyncio
async def test_an_agent_that_disconnects_is_recorded_as_cancelled(serve: Serve, stream: bool) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine)
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        await http("POST", "/rollouts/r")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                async with aiohttp.ClientSession() as agent:
                    body = {"input": "q", "stream": stream}
                    async with agent.post(f"{http.root}/rollouts/r/v1/responses", json=body) as answer:
                        await answer.text()
        await until(lambda: engine.cancelled == 1)
        await asyncio.sleep(0.02)
        _, page = await http("GET", "/rollouts/r")
        assert [entry["status"] for entry in page["calls"]] == ["cancelled"]
        assert page["in_flight"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.asyncio
async def test_failures_are_recorded(serve: Serve, stream: bool) -> None:
    url = await serve(engine=HeldEngine([], error=RuntimeError("the engine broke"), after_s=0.05))
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        await http("POST", "/rollouts/r")
        async with session.post(
            f"{http.root}/rollouts/r/v1/responses", json={"input": "q", "stream": stream}
        ) as answer:
            assert "the engine broke" in await answer.text()
        async with session.post(f"{http.root}/rollouts/r/v1/responses", data=b"{not json") as answer:
            assert answer.status == 400
        _, page = await http("GET", "/rollouts/r")
    assert [(call["status"], call["error"]["error"]) for call in page["calls"]] == [
        ("failed", "RuntimeError"),
        ("refused", "PolicyError"),
    ]


@pytest.mark.asyncio
async def test_equal_histories_of_two_captures_do_not_share_tokens(
    serve: Serve, renderer: TemplateRenderer
) -> None:
    plain = renderer.encode(say_text("The"))
    odd = [*(token for letter in "The" for token in renderer.encode(letter)), plain[-1]]
    assert odd != plain
    engine = HeldEngine([odd, plain, plain, plain])
    engine.release.set()
    url = await serve(engine=engine)
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        history = [USER, {"role": "assistant", "content": "The"}, USER]
        for name in ("x", "y"):
            await http("POST", f"/rollouts/{name}")
            await http("POST", f"/rollouts/{name}/v1/responses", {"input": [USER]})
        for name in ("x", "y"):
            await http("POST", f"/rollouts/{name}/v1/responses", {"input": history})
    size = len(engine.prompts[0])
    assert engine.prompts[2][size : size + len(odd)] == odd
    assert engine.prompts[3][size : size + len(plain)] == plain


def test_limits_are_positive() -> None:
    with pytest.raises(ConfigurationError, match="ttl_s must be positive"):
        CaptureLimits(ttl_s=0)


@pytest.mark.asyncio
async def test_requests_that_name_the_response_before_have_its_history(serve: Serve) -> None:
    url = await serve([say_text("one"), say_text("two")])
    async with aiohttp.ClientSession() as session:
        http = Http(session, url)
        await http("POST", "/rollouts/r")
        _, first = await http("POST", "/rollouts/r/v1/responses", {"input": "q"})
        body = {"input": "and", "previous_response_id": first["id"]}
        _, second = await http("POST", "/rollouts/r/v1/responses", body)
        _, page = await http("DELETE", "/rollouts/r")
    assert second["previous_response_id"] == first["id"]
    calls = restore(CapturePage.model_validate(page).calls)
    assert [getattr(item, "text", "") for item in calls[1].input] == ["q", "one", "and"]
    assert calls[1].tokens is not None
    assert calls[1].tokens.parent is calls[0].tokens


@pytest.mark.asyncio
async def test_the_forms_of_the_tokens(serve: Serve) -> None:
    url = await serve([say_text("one")] * 3)
    async with aiohttp.ClientSession() as session:
        for form in ("item", "response", "compact"):
            async with session.post(
                f"{url}/responses", json={"input": "q"}, headers={"Gym-Token-Form": form}
            ) as answer:
                body = await answer.json()
            places = {
                "item": "generation_token_ids" in body["output"][-1],
                "response": "generation_token_ids" in body,
                "compact": "token_delta" in body,
            }
            assert [name for name, there in places.items() if there] == [form]
        for path, form in (("responses", "none"), ("chat/completions", "compact")):
            async with session.post(f"{url}/{path}", headers={"Gym-Token-Form": form}, json={}) as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["param"] == "Gym-Token-Form"
