"""Request ids, log lines, error shapes, OPTIONS and CORS over real connections."""

from __future__ import annotations

import asyncio
import json
import logging

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.held import HeldEngine, until
from support.operating import ASK, operated
from support.replay import ReplayEngine

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server.errors import is_anthropic
from backends.server.operation import AccessConfig, log_formatter

pytestmark = pytest.mark.asyncio

LAB = "https://lab.example"


@pytest.fixture
def policy(renderer: TemplateRenderer) -> Policy:
    return Policy(ReplayEngine([renderer.encode("three")] * 8), renderer)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/responses", ASK, 200),
        ("POST", "/v1/responses", {**ASK, "stream": True}, 200),
        ("POST", "/v1/responses", {"input": "q", "temperature": -1}, 400),
        ("GET", "/v1/nowhere", None, 404),
        ("GET", "/v1/responses", None, 405),
        ("GET", "/health", None, 200),
    ],
)
async def test_every_answer_has_its_requests_id(
    policy: Policy, method: str, path: str, body: object, status: int
) -> None:
    async with operated(policy) as server:
        mine = await server.ask(method, path, json=body, headers={"X-Request-Id": "mine-1.2:3"})
        assert (mine.status, mine.headers["x-request-id"]) == (status, "mine-1.2:3")
        assert int(mine.headers["openai-processing-ms"]) >= 0
        ids = set()
        for sent in ("", "has blank", "x" * 129, "ümlaut", "a\tb"):
            answer = await server.ask(method, path, json=body, headers={"X-Request-Id": sent})
            ids.add(answer.headers["x-request-id"])
        assert len(ids) == 5
        assert all(name.startswith("req_") for name in ids)


async def test_openais_client_shows_the_id(policy: Policy) -> None:
    async with operated(policy) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError) as caught:
                await client.responses.create(
                    model="gpt-9", input="q", extra_headers={"X-Request-Id": "shown"}
                )
        assert caught.value.request_id == "shown"


async def test_unknown_routes_and_methods_have_openais_shape(policy: Policy) -> None:
    async with operated(policy) as server:
        for method in ("GET", "POST", "PURGE"):
            answer = await server.ask(method, "/v1/nowhere")
            assert (answer.status, answer.code) == (404, "unknown_url")
            assert f"{method} /v1/nowhere" in answer.body["error"]["message"]
        answer = await server.ask("DELETE", "/v1/responses")
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert answer.body["error"]["type"] == "invalid_request_error"
        head = await server.ask("HEAD", "/v1/models")
        assert (head.status, head.body) == (200, b"")


async def test_a_request_makes_one_line_without_secrets(
    renderer: TemplateRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    access = AccessConfig(api_keys=("hush-hush",))
    policy = Policy(ReplayEngine([renderer.encode("three")]), renderer)
    async with operated(policy, access=access) as server:
        headers = {"Authorization": "Bearer hush-hush", "X-Request-Id": "one"}
        await server.ask("POST", "/v1/responses?api_key=hush-hush", json=ASK, headers=headers)
        await server.ask("GET", "/v1/models?token=hush-hush", headers={"x-api-key": "hush-hash"})
        await server.ask("GET", "/health")
    records = [record for record in caplog.records if record.name.endswith("observing")]
    fields = [record.fields for record in records]  # type: ignore[attr-defined]
    assert [(line["method"], line["path"], line["status"]) for line in fields] == [
        ("POST", "/v1/responses", 200),
        ("GET", "/v1/models", 401),
    ]
    assert fields[1]["error"] == "invalid_api_key"
    assert fields[0]["client"] == "127.0.0.1"
    assert fields[0]["duration_ms"] > 0
    assert not [record for record in caplog.records if "hush" in record.getMessage() + str(record.__dict__)]


async def test_a_client_that_went_away_is_logged_as_such(
    renderer: TemplateRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    held = HeldEngine([renderer.encode("three")])
    async with operated(Policy(held, renderer)) as server:
        call = asyncio.create_task(server.ask("POST", "/v1/responses", json=ASK))
        await until(lambda: held.running == 1)
        call.cancel()
        await until(lambda: any(getattr(line, "fields", {}).get("status") == 499 for line in caplog.records))


async def test_a_bug_is_logged_with_its_request(
    renderer: TemplateRenderer, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter("json"))
    logger = logging.getLogger("backends.server")
    logger.addHandler(handler)
    try:
        held = HeldEngine([], error=RuntimeError("a bug"), after_s=0.01)
        async with operated(Policy(held, renderer)) as server:
            answer = await server.ask("POST", "/v1/responses", json=ASK, headers={"X-Request-Id": "it"})
    finally:
        logger.removeHandler(handler)
    assert answer.status == 500
    assert set(answer.body["error"]) == {"message", "type", "param", "code"}
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line["level"] == "error")
    assert line["request_id"] == "it"
    assert "RuntimeError: a bug" in line["exception"]
    assert "Traceback" in line["exception"]


@given(st.text(), st.dictionaries(st.text(min_size=1), st.text()))
def _line_of(message: str, fields: dict[str, str]) -> None:
    record = logging.LogRecord("n", logging.INFO, __file__, 1, "%s", (message,), None)
    record.fields = {f"x_{name}": value for name, value in fields.items()}
    line = log_formatter("json").format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == message
    assert json.loads(line).items() >= record.fields.items()


async def test_a_json_line_is_one_line_whatever_it_says() -> None:
    _line_of()


async def test_options_say_what_there_is(policy: Policy) -> None:
    async with operated(policy) as server:
        answer = await server.ask("OPTIONS", "/v1/responses")
        assert (answer.status, answer.headers["allow"]) == (204, "OPTIONS, POST")
        assert (await server.ask("OPTIONS", "/v1/nowhere")).status == 404


def preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }


async def test_pages_are_kept_out_unless_their_origin_is_named(policy: Policy) -> None:
    async with operated(policy) as server:
        answer = await server.ask("OPTIONS", "/v1/responses", headers=preflight(LAB))
        assert not [name for name in answer.headers if name.startswith("access-control")]
        answer = await server.ask("GET", "/v1/models", headers={"Origin": LAB})
        assert "access-control-allow-origin" not in answer.headers
        # what a page can send without asking, and without reading the answer
        text = {"Origin": LAB, "Content-Type": "text/plain"}
        for path in ("/v1/responses", "/abort_request"):
            answer = await server.ask("POST", path, data=b"{}", headers=text)
            assert (answer.status, answer.code) == (403, "origin_not_allowed")
        own = {"Origin": server.url}
        assert (await server.ask("POST", "/v1/responses", json=ASK, headers=own)).status == 200


async def test_pages_of_named_origins_may_call(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode("three")] * 4), renderer)
    access = AccessConfig(api_keys=("k",), cors_origins=(LAB,))
    async with operated(policy, access=access) as server:
        answer = await server.ask("OPTIONS", "/v1/responses", headers=preflight(LAB))  # browsers send no key
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == LAB
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
        key = {"Origin": LAB, "x-api-key": "k"}
        for body, status in [(ASK, 200), ({**ASK, "stream": True}, 200), ({"temperature": -1}, 400)]:
            answer = await server.ask("POST", "/v1/responses", json=body, headers=key)
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, LAB)
            assert "Origin" in answer.headers["vary"]
        answer = await server.ask("POST", "/v1/responses", json=ASK, headers={"Origin": LAB})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, LAB)
        other = await server.ask("OPTIONS", "/v1/responses", headers=preflight("https://evil.example"))
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("path", "anthropic"),
    [
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/rollouts/r_1/v1/messages", True),
        ("/v1/messages_of_others", False),
        ("/v1/responses", False),
        ("/x/v1/messages", False),
    ],
)
async def test_whose_errors_a_path_has(path: str, anthropic: bool) -> None:
    assert is_anthropic(path) is anthropic
