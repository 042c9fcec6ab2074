"""The routes for state, called by the openai package and without it, on a real policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from pydantic_core import to_json
from support.held import HeldEngine, until
from support.stored import asked, stored

from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from backends.server.state import RUNS, STORE, MemoryStore, Run, SqliteStore, StoredResponse
from gym_sdk.schema import Message, Response

pytestmark = pytest.mark.asyncio

USER = {"role": "user", "content": "1 + 2 ="}


@pytest_asyncio.fixture
async def server(untrained_policy: Path) -> AsyncIterator[TestServer]:
    policy = load_policy(PolicyConfig(model=str(untrained_policy), context_length=256))
    async with TestServer(make_app(policy, keep_alive_s=0.05), handler_cancellation=True) as server:
        yield server
    await policy.aclose()


@pytest_asyncio.fixture
async def client(server: TestServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = str(server.make_url("/v1"))
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def call(
    server: TestServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    url = server.make_url(path)
    async with aiohttp.ClientSession() as session:
        async with session.request(method, url, json=body, headers=headers) as answer:
            return answer.status, await answer.json()


async def keep(server: TestServer, *responses: StoredResponse) -> None:
    for response in responses:
        await server.app[STORE].keep(response)


async def create(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return await client.responses.create(model="policy", max_output_tokens=8, **fields)


async def test_a_response_is_retrieved_as_it_was(client: openai.AsyncOpenAI) -> None:
    made = await create(client, input="1 + 2 =", metadata={"a": "b"})
    again = await client.responses.retrieve(made.id, include=["reasoning.encrypted_content"])
    assert again.to_dict() == made.to_dict()


@pytest.mark.parametrize("form", ["item", "response", "compact"])
async def test_tokens_come_in_the_form_that_is_asked_for(
    server: TestServer, client: openai.AsyncOpenAI, form: str
) -> None:
    made = await create(client, input="1 + 2 =")
    status, body = await call(server, "GET", f"/v1/responses/{made.id}", **{"Gym-Token-Form": form})
    assert status == 200
    tokens = Response.model_validate(body).tokens
    assert tokens == Response.model_validate(made.to_dict()).tokens
    assert ("token_delta" in body, "prompt_token_ids" in body) == (form == "compact", form == "response")
    status, body = await call(server, "GET", f"/v1/responses/{made.id}", **{"Gym-Token-Form": "x"})
    assert (status, body["error"]["param"]) == (400, "Gym-Token-Form")


async def test_a_deleted_response_is_gone_everywhere(client: openai.AsyncOpenAI) -> None:
    made = await create(client, input="1 + 2 =")
    more = await create(client, input="and 3?", previous_response_id=made.id)
    await client.responses.delete(made.id)
    for gone in (
        client.responses.retrieve(made.id),
        client.responses.delete(made.id),
        client.responses.cancel(made.id),
        client.responses.input_items.list(made.id),
        create(client, input="?", previous_response_id=made.id),
        create(client, input=[{"type": "item_reference", "id": made.output[-1].id}]),
    ):
        with pytest.raises(openai.APIStatusError):
            await gone
    last = await create(client, input="and 4?", previous_response_id=more.id)  # what it came from is its own
    assert "fork" not in last.to_dict()


async def test_what_is_deleted_is_named(server: TestServer) -> None:
    kept = stored("one")
    await keep(server, kept)
    assert await call(server, "DELETE", f"/v1/responses/{kept.id}") == (
        200,
        {"id": kept.id, "object": "response", "deleted": True},
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("GET", "?stream=true")],
)
async def test_what_is_not_there_is_not_found(server: TestServer, method: str, path: str) -> None:
    elsewhere = stored("one", scope="r1", response_id="resp_1")
    await keep(server, elsewhere)
    status, body = await call(server, method, f"/v1/responses/resp_1{path}")
    assert status == 404
    assert body["error"] == {
        "message": "Response with id 'resp_1' not found.",
        "type": "not_found_error",
        "param": "response_id",
        "code": "not_found",
    }


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?include=nothing", "include[0]"),
        ("?include[]=reasoning.encrypted_content&include[]=nothing", "include[1]"),
        ("?colour=red", "colour"),
        ("?stream=maybe", "stream"),
        ("?stream=true&stream=true", "stream"),
        ("?stream=true", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?stream=true&starting_after=-1", "starting_after"),
        ("?stream=true&starting_after=" + "9" * 5000, "starting_after"),
        ("?stream=true&include_obfuscation=true", "include_obfuscation"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_x", "after"),
        ("/input_items?before=msg_x", "before"),
        ("/input_items?stream=true", "stream"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(server: TestServer, path: str, param: str) -> None:
    kept = stored("one")
    await keep(server, kept)
    status, body = await call(server, "GET", f"/v1/responses/{kept.id}{path}")
    assert (status, body["error"]["param"]) == (400, param)


async def test_all_input_items_are_listed_with_ids_that_can_be_referred_to(
    client: openai.AsyncOpenAI,
) -> None:
    first = await create(client, input="1 + 2 =")
    second = await create(client, input=[USER, USER], previous_response_id=first.id)
    listed = [item async for item in client.responses.input_items.list(second.id, limit=2, order="asc")]
    assert [item.type for item in listed] == [
        "message",
        *(item.type for item in first.output),
        *["message"] * 2,
    ]
    assert [item.id for item in listed[1:-2]] == [item.id for item in first.output]
    assert len({item.id for item in listed}) == len(listed)
    newest_first = [item async for item in client.responses.input_items.list(second.id)]
    assert newest_first == listed[::-1]
    reference: Any = {"type": "item_reference", "id": listed[0].id}
    by_reference = await create(client, input=[reference])
    by_value = await create(client, input="1 + 2 =")
    assert by_reference.usage.input_tokens == by_value.usage.input_tokens


async def test_the_list_has_the_shape_of_the_api(server: TestServer) -> None:
    first = stored("one", response_id="resp_1")
    second = stored("two", previous=first)
    await keep(server, first, second)
    status, body = await call(server, "GET", f"/v1/responses/{second.id}/input_items?limit=2")
    assert status == 200
    said = first.response.output[0]
    assert [item["id"] for item in body["data"]] == [f"msg_{second.id}_0", said.id]
    assert (body["object"], body["has_more"]) == ("list", True)
    assert (body["first_id"], body["last_id"]) == (f"msg_{second.id}_0", said.id)
    assert "generation_token_ids" not in body["data"][1]


async def test_what_was_not_stored_is_missed(server: TestServer) -> None:
    second = stored("two", previous=stored("one", response_id="resp_1"))
    await keep(server, second)
    status, body = await call(server, "GET", f"/v1/responses/{second.id}/input_items")
    assert status == 404
    assert "'resp_1', which was not stored" in body["error"]["message"]


async def test_input_tokens_are_those_of_the_prompt(client: openai.AsyncOpenAI) -> None:
    first = await create(client, input="1 + 2 =", instructions="Add.")
    asked: dict[str, Any] = {"input": "and 3?", "instructions": "Add.", "previous_response_id": first.id}
    counted = await client.responses.input_tokens.count(model="policy", **asked)
    assert counted.object == "response.input_tokens"
    second = await create(client, **asked)
    assert counted.input_tokens == second.usage.input_tokens
    long = await client.responses.input_tokens.count(model="policy", input="1 + 1 = " * 500)
    assert long.input_tokens > 256
    with pytest.raises(openai.BadRequestError, match="conversation"):
        await client.responses.input_tokens.count(model="policy", input="x", conversation="conv_1")


async def test_only_what_runs_in_the_background_is_cancelled(
    server: TestServer, client: openai.AsyncOpenAI
) -> None:
    made = await create(client, input="1 + 2 =")
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        await client.responses.cancel(made.id)
    done = stored("done", background=True)
    await keep(server, done)
    for _ in range(2):
        assert (await client.responses.cancel(done.id)).status == "completed"


async def hang(run: Run) -> None:
    run.response = run.response.model_copy(
        update={"status": "in_progress", "output": [Message(id="msg_1", role="assistant", content=[])]}
    )
    await asyncio.Event().wait()


async def test_what_runs_is_read_and_cancelled(server: TestServer, client: openai.AsyncOpenAI) -> None:
    begun = stored("x", status="queued", background=True, response_id="resp_1")
    await server.app[RUNS].start(begun, hang)
    await until(lambda: server.app[RUNS].get("resp_1", "").response.status == "in_progress", 60)  # type: ignore[union-attr]
    read = await client.responses.retrieve("resp_1")
    assert (read.status, [item.id for item in read.output]) == ("in_progress", ["msg_1"])
    with pytest.raises(openai.BadRequestError, match="not done yet"):
        await create(client, input="?", previous_response_id="resp_1")
    for _ in range(2):
        cancelled = await client.responses.cancel("resp_1")
        assert (cancelled.status, [item.id for item in cancelled.output]) == ("cancelled", ["msg_1"])


async def test_what_runs_is_cancelled_before_it_is_deleted(
    server: TestServer, client: openai.AsyncOpenAI
) -> None:
    ended = asyncio.Event()

    async def work(run: Run) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await server.app[RUNS].start(
        stored("x", status="queued", background=True, response_id="resp_1"), work, streamed=True
    )
    await asyncio.sleep(0)
    await client.responses.delete("resp_1")
    assert ended.is_set()
    for streamed in (False, True):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_1", stream=streamed)


async def test_what_a_crash_ended_has_failed(server: TestServer, client: openai.AsyncOpenAI) -> None:
    await keep(server, stored("x", status="in_progress", background=True, response_id="resp_1"))
    read = await client.responses.retrieve("resp_1")
    assert read.status == "failed"
    assert read.error is not None
    assert (await client.responses.cancel("resp_1")).status == "failed"


async def test_a_stream_is_taken_up_where_it_broke_off(
    server: TestServer, client: openai.AsyncOpenAI
) -> None:
    go = asyncio.Event()

    async def work(run: Run) -> None:
        for number in range(4):
            if number == 2:
                await go.wait()
            event = {"type": "response.output_text.delta", "sequence_number": number, "delta": "x"}
            run.write(b"event: response.output_text.delta\ndata: " + to_json(event) + b"\n\n")
        run.response = run.response.model_copy(update={"status": "completed"})
        run.write(b"data: [DONE]\n\n")

    await server.app[RUNS].start(
        stored("x", status="queued", background=True, response_id="resp_1"), work, streamed=True
    )
    begun = await client.responses.retrieve("resp_1", stream=True)
    assert [(await anext(begun)).sequence_number for _ in range(2)] == [0, 1]
    await begun.close()
    rest = await client.responses.retrieve("resp_1", stream=True, starting_after=0)
    assert (await anext(rest)).sequence_number == 1
    url = server.make_url("/v1/responses/resp_1?stream=true&starting_after=1")
    async with aiohttp.ClientSession() as session, session.get(url) as waiting:
        assert await waiting.content.readuntil(b"\n\n") == b": keep-alive\n\n"
    go.set()
    assert [event.sequence_number async for event in rest] == [2, 3]
    again = await client.responses.retrieve("resp_1", stream=True, starting_after=3)
    assert [event async for event in again] == []


async def test_a_response_is_made_while_nobody_waits(client: openai.AsyncOpenAI) -> None:
    begun = await create(client, input="1 + 2 =", background=True)
    assert begun.status == "queued"
    async with asyncio.timeout(60):
        while (made := await client.responses.retrieve(begun.id)).status in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
    assert made.status in ("completed", "incomplete")
    assert made.background
    more = await create(client, input="and 3?", previous_response_id=made.id)
    assert "fork" not in more.to_dict()
    assert (await client.responses.cancel(made.id)).to_dict() == made.to_dict()

    events = [event async for event in await create(client, input="?", background=True, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    again = await client.responses.retrieve(events[0].response.id, stream=True, starting_after=1)
    assert [event.to_dict() async for event in again] == [event.to_dict() for event in events[2:]]
    final = await client.responses.retrieve(events[0].response.id)
    assert final.to_dict() == events[-1].response.to_dict()


async def test_a_rollouts_state_is_its_own(server: TestServer) -> None:
    for rollout in ("r1", "r2"):
        await call(server, "POST", f"/rollouts/{rollout}")
    status, made = await call(
        server, "POST", "/rollouts/r1/v1/responses", {"input": [USER], "max_output_tokens": 4}
    )
    assert status == 200
    path = f"v1/responses/{made['id']}"
    assert (await call(server, "GET", f"/rollouts/r1/{path}"))[0] == 200
    assert (await call(server, "GET", f"/rollouts/r1/{path}/input_items"))[0] == 200
    for other in ("/rollouts/r2/", "/"):
        for method in ("GET", "DELETE"):
            assert (await call(server, method, other + path))[0] == 404
    status, body = await call(server, "GET", f"/rollouts/r3/{path}")
    assert (status, body["error"]["code"]) == (404, "capture_not_found")
    status, body = await call(server, "POST", "/rollouts/r1/v1/responses/input_tokens", {"input": [USER]})
    assert body == {"object": "response.input_tokens", "input_tokens": made["usage"]["input_tokens"]}
    assert (await call(server, "DELETE", f"/rollouts/r1/{path}"))[0] == 200


async def test_a_restarted_server_goes_on(untrained_policy: Path, tmp_path: Path) -> None:
    made: list[Any] = []
    for text in ("1 + 2 =", "and 3?", "and 4?"):
        policy = load_policy(PolicyConfig(model=str(untrained_policy), context_length=256))
        app = make_app(policy, store=SqliteStore(tmp_path / "kept.db"))
        async with TestServer(app) as server:
            url = str(server.make_url("/v1"))
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                last = made[-1].id if made else None
                made.append(await create(client, input=text, previous_response_id=last))
                for each in made:
                    assert (await client.responses.retrieve(each.id)).to_dict() == each.to_dict()
        await policy.aclose()
    for before, after in pairwise(made):
        known = Response.model_validate(before.to_dict()).tokens
        tokens = Response.model_validate(after.to_dict()).tokens
        assert known is not None
        assert tokens is not None
        assert tokens.prompt_token_ids[: known.total_tokens] == known.token_ids


async def test_the_end_of_the_server_is_kept(renderer: TemplateRenderer, tmp_path: Path) -> None:
    engine = HeldEngine([])
    app = make_app(Policy(engine, renderer), store=SqliteStore(tmp_path / "kept.db"))
    async with TestServer(app) as server:
        begun = stored("x", status="queued", background=True, response_id="resp_1")
        await server.app[RUNS].start(begun, hang)
        await asyncio.sleep(0)
    store = SqliteStore(tmp_path / "kept.db")
    kept = await store.get("resp_1", "")
    assert kept is not None
    assert kept.response.status == "failed"
    assert kept.response.error is not None
    assert kept.response.error.message == "the server stopped before this was done"
    await store.aclose()


async def test_an_application_may_bring_its_store(renderer: TemplateRenderer) -> None:
    store = MemoryStore()
    await store.keep(StoredResponse.of(stored("one", response_id="resp_1").response, [asked("x")]))
    async with TestServer(make_app(Policy(HeldEngine([]), renderer), store=store)) as server:
        assert (await call(server, "GET", "/v1/responses/resp_1"))[0] == 200
    assert len(store) == 0
