"""What any backend promises for `POST /v1/responses`, written from the specification, one function each."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import aiohttp
import jsonschema

from conformance.judge import events_of, judge_error, judge_response, rebuilt

Check: TypeAlias = Callable[["Server"], Awaitable[None]]

CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    "strict": True,
}
CLOCK = {
    "type": "function",
    "name": "clock",
    "description": "Tell the time.",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    "strict": None,
}
SUM = "State the final answer to the following arithmetic problem: 12 + 5 ="
TOKENS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs", "weight_versions")

CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


class Server:
    """A server under test.

    Args:
        url: its root, ending in `/v1`.
        session: what asks it.
        seeded: whether its engine honours seeds.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, *, seeded: bool) -> None:
        self.url = url
        self.session = session
        self.seeded = seeded

    async def ask(self, **body: Any) -> dict[str, Any]:
        """Return the response to a request, judged."""
        body = {"input": SUM, "max_output_tokens": 48, **body}
        async with self.session.post(f"{self.url}/responses", json=body) as answer:
            got = await answer.json()
            assert answer.status == 200, got
        return judge_response(got)

    async def stream(self, **body: Any) -> list[dict[str, Any]]:
        """Return the events of a request's stream, judged."""
        body = {"input": SUM, "max_output_tokens": 48, "stream": True, **body}
        async with self.session.post(f"{self.url}/responses", json=body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            assert answer.content_type == "text/event-stream"
        return events_of(text)

    async def refused(self, *, status: int = 400, param: str | None, **body: Any) -> dict[str, Any]:
        """Assert that a request is refused, whether it asks for a stream or not."""
        for streams in (False, True):
            asked = {"input": SUM, **body, "stream": streams}
            async with self.session.post(f"{self.url}/responses", json=asked) as answer:
                got = await answer.json()
                judge_error(answer, got, status=status, param=param)
        return dict(got["error"])


def calls(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in response["output"] if item["type"] == "function_call"]


def text_of(response: dict[str, Any]) -> str:
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for message in messages for part in message["content"])


@check
async def a_response_is_whole(server: Server) -> None:
    response = await server.ask(metadata={"run": "1"}, safety_identifier="me", prompt_cache_key="k", user="u")
    assert response["id"].startswith("resp_")
    assert (response["object"], response["model"]) == ("response", "policy")
    assert response["status"] in ("completed", "incomplete")
    assert (response["temperature"], response["top_p"]) == (1.0, 1.0)
    assert (response["metadata"], response["safety_identifier"]) == ({"run": "1"}, "me")
    assert (response["prompt_cache_key"], response["user"]) == ("k", "u")
    assert (response["tool_choice"], response["truncation"], response["store"]) == ("auto", "disabled", True)
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@check
async def the_tokens_stand_on_the_last_item(server: Server) -> None:
    response = await server.ask()
    *others, last = response["output"]
    assert all(name in last for name in TOKENS)
    assert not any(name in item for item in others for name in TOKENS)
    assert len(last["generation_token_ids"]) == len(last["generation_log_probs"])
    assert len(last["generation_token_ids"]) == response["usage"]["output_tokens"]
    assert len(last["prompt_token_ids"]) == response["usage"]["input_tokens"]
    spans = last["weight_versions"]
    assert (spans[0]["start"], spans[-1]["end"]) == (0, len(last["generation_token_ids"]))


@check
async def max_output_tokens_is_exact(server: Server) -> None:
    response = await server.ask(max_output_tokens=2, input="Tell me a long story.")
    assert response["usage"]["output_tokens"] == 2
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert response["completed_at"] is None


@check
async def a_stream_builds_the_response(server: Server) -> None:
    for tools in ([], [CALCULATOR]):
        events = await server.stream(tools=tools)
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] in ("response.completed", "response.incomplete")
        final = events[-1]["response"]
        assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}
        output = [{name: item[name] for name in item if name not in TOKENS} for item in final["output"]]
        assert rebuilt(events) == output
        assert final["usage"]["output_tokens"] == len(final["output"][-1]["generation_token_ids"])


@check
async def greedy_streams_say_what_responses_say(server: Server) -> None:
    fixed: dict[str, Any] = {"temperature": 0, "tools": [CALCULATOR]}
    whole = await server.ask(**fixed)
    streamed = (await server.stream(**fixed))[-1]["response"]
    said = [
        [(item["type"], item.get("arguments"), item.get("content")) for item in response["output"]]
        for response in (whole, streamed)
    ]
    assert said[0] == said[1]


@check
async def log_probs_come_with_the_text(server: Server) -> None:
    asked: dict[str, Any] = {
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 3,
        "tool_choice": "none",
        "temperature": 0,
    }
    response = await server.ask(**asked)
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    last = response["output"][-1]
    for part in parts:
        spelled = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
        assert part["text"].encode() in spelled
        for entry in part["logprobs"]:
            assert len(entry["top_logprobs"]) == 3
            # greedy: what was sampled is the likeliest
            assert entry["top_logprobs"][0]["token"] == entry["token"]
            assert any(abs(entry["logprob"] - known) < 1e-3 for known in last["generation_log_probs"])
    events = await server.stream(**asked)
    assert rebuilt(events)[-1]["content"][0]["logprobs"] == [
        entry for part in events[-1]["response"]["output"][-1]["content"] for entry in part["logprobs"]
    ]


@check
async def stop_strings_end_the_text(server: Server) -> None:
    whole = await server.ask(temperature=0, tool_choice="none")
    text = text_of(whole)
    stop = text[len(text) // 2 :][:2]
    response = await server.ask(temperature=0, tool_choice="none", stop=[stop])
    assert text_of(response) == text[: text.index(stop)]
    assert (response["status"], response["stop_sequence"]) == ("completed", stop)
    ids = response["output"][-1]["generation_token_ids"]
    assert ids == whole["output"][-1]["generation_token_ids"][: len(ids)]
    events = await server.stream(temperature=0, tool_choice="none", stop=stop)
    assert text_of({"output": rebuilt(events)}) == text_of(response)


@check
async def tool_choice_is_obeyed(server: Server) -> None:
    tools = [CALCULATOR, CLOCK]
    none = await server.ask(tools=tools, tool_choice="none")
    assert not calls(none)
    for choice, names in (
        ("required", {"calculator", "clock"}),
        ({"type": "function", "name": "clock"}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "calculator"}],
            },
            {"calculator"},
        ),
    ):
        response = await server.ask(
            tools=tools, tool_choice=choice, max_output_tokens=120, parallel_tool_calls=False
        )
        assert response["tool_choice"] == choice
        found = calls(response)
        if response["status"] == "completed":
            assert len(found) == 1
        for call in found:
            assert call["name"] in names
            schema = (CALCULATOR if call["name"] == "calculator" else CLOCK)["parameters"]
            jsonschema.validate(json.loads(call["arguments"]), schema)


@check
async def calls_are_limited(server: Server) -> None:
    for limit in ({"parallel_tool_calls": False}, {"max_tool_calls": 1}):
        response = await server.ask(
            tools=[CALCULATOR], tool_choice="required", max_output_tokens=120, **limit
        )
        assert len(calls(response)) <= 1
        for name, value in limit.items():
            assert response[name] == value


@check
async def custom_tools_take_text(server: Server) -> None:
    shell = {"type": "custom", "name": "shell", "description": "Run a command."}
    choice = {"type": "custom", "name": "shell"}
    asked: dict[str, Any] = {"tools": [shell], "tool_choice": choice, "max_output_tokens": 100}
    response = await server.ask(**asked)
    if response["status"] == "completed":
        assert [item["type"] for item in response["output"] if item["type"] != "reasoning"] == [
            "custom_tool_call"
        ]
        call = response["output"][-1]
        answer = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "done"}
        history = [{"role": "user", "content": SUM}, *response["output"], answer]
        after = await server.ask(input=history, tools=[shell])
        assert "fork" not in after
    rebuilt(await server.stream(**asked))


@check
async def text_formats_are_kept(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    formats: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "json_schema", "name": "answer", "schema": schema, "strict": True}, schema),
        ({"type": "json_object"}, {"type": "object"}),
    ]
    for form, wanted in formats:
        response = await server.ask(text={"format": form}, max_output_tokens=200)
        assert response["text"]["format"]["type"] == form["type"]
        if response["status"] == "completed":
            jsonschema.validate(json.loads(text_of(response)), wanted)


@check
async def a_conversation_goes_on_by_id_and_by_items(server: Server) -> None:
    first = await server.ask(tools=[CALCULATOR], tool_choice="required", max_output_tokens=100)
    found = calls(first)
    outputs = [{"type": "function_call_output", "call_id": call["call_id"], "output": "17"} for call in found]
    more = outputs or [{"role": "user", "content": "Go on."}]
    by_id = await server.ask(input=more, previous_response_id=first["id"], tools=[CALCULATOR])
    assert by_id["previous_response_id"] == first["id"]
    user = {"role": "user", "content": SUM}
    by_items = await server.ask(input=[user, *first["output"], *more], tools=[CALCULATOR])
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    by_reference = await server.ask(input=[user, *references, *more], tools=[CALCULATOR])
    known = first["output"][-1]
    tokens = [*known["prompt_token_ids"], *known["generation_token_ids"]]
    for response in (by_id, by_items, by_reference):
        assert "fork" not in response
        prompt = response["output"][-1]["prompt_token_ids"]
        assert prompt[: len(tokens)] == tokens
        assert prompt == by_id["output"][-1]["prompt_token_ids"]


@check
async def sealed_thinking_comes_back(server: Server) -> None:
    response = await server.ask(include=["reasoning.encrypted_content"])
    for item in response["output"]:
        if item["type"] == "reasoning":
            assert item["encrypted_content"]
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAA of another server"}
    await server.refused(param="input[0].encrypted_content", input=[sealed, {"role": "user", "content": "q"}])


@check
async def responses_are_kept(server: Server) -> None:
    response = await server.ask(input=[{"role": "user", "content": "q"}], store=True)
    url = f"{server.url}/responses/{response['id']}"
    async with server.session.get(url) as answer:
        assert judge_response(await answer.json()) == response
    async with server.session.get(f"{url}/input_items") as answer:
        listed = await answer.json()
        assert (listed["object"], listed["has_more"], len(listed["data"])) == ("list", False, 1)
        assert listed["first_id"] == listed["last_id"] == listed["data"][0]["id"]
    async with server.session.delete(url) as answer:
        assert await answer.json() == {"id": response["id"], "object": "response", "deleted": True}
    for method, path in (
        ("GET", url),
        ("DELETE", url),
        ("GET", f"{url}/input_items"),
        ("POST", f"{url}/cancel"),
    ):
        async with server.session.request(method, path) as answer:
            judge_error(answer, await answer.json(), status=404, param="response_id")
    await server.refused(param="previous_response_id", previous_response_id=response["id"])


@check
async def nothing_is_kept_that_is_not_to_be(server: Server) -> None:
    response = await server.ask(store=False)
    assert response["store"] is False
    async with server.session.get(f"{server.url}/responses/{response['id']}") as answer:
        judge_error(answer, await answer.json(), status=404, param="response_id")


@check
async def the_background_is_polled_and_followed(server: Server) -> None:
    queued = await server.ask(background=True)
    assert (queued["status"], queued["background"], queued["output"]) == ("queued", True, [])
    url = f"{server.url}/responses/{queued['id']}"
    newest = queued
    while newest["status"] in ("queued", "in_progress"):
        async with server.session.get(url) as answer:
            newest = judge_response(await answer.json())
    assert newest["status"] in ("completed", "incomplete")
    assert newest["background"] is True
    assert len(newest["output"][-1]["generation_token_ids"]) == newest["usage"]["output_tokens"]
    events = await server.stream(background=True)
    name = events[0]["response"]["id"]
    async with server.session.get(f"{server.url}/responses/{name}?stream=true&starting_after=2") as answer:
        text = await answer.text()
    again = [json.loads(block.split("\ndata: ")[1]) for block in text.split("\n\n")[:-2]]
    assert again == events[3:]
    await server.refused(param="background", background=True, store=False)


@check
async def input_tokens_are_counted(server: Server) -> None:
    response = await server.ask(tools=[CALCULATOR], instructions="Be brief.")
    body = {"input": SUM, "tools": [CALCULATOR], "instructions": "Be brief."}
    async with server.session.post(f"{server.url}/responses/input_tokens", json=body) as answer:
        counted = await answer.json()
    assert counted == {"object": "response.input_tokens", "input_tokens": response["usage"]["input_tokens"]}


@check
async def truncation_drops_old_turns(server: Server) -> None:
    turns = [
        {"role": role, "content": f"{number} and some words " * 8}
        for number in range(60)
        for role in ("user", "assistant")
    ]
    history = [{"role": "system", "content": "You add."}, *turns, {"role": "user", "content": "1 + 1?"}]
    error = await server.refused(param="input", input=history)
    assert error["code"] == "context_length_exceeded"
    response = await server.ask(input=history, truncation="auto", max_output_tokens=16)
    assert response["truncation"] == "auto"
    assert response["usage"]["output_tokens"] > 0


@check
async def seeds_repeat(server: Server) -> None:
    if not server.seeded:
        await server.refused(param="seed", seed=7)
        return
    one, same, other = [await server.ask(seed=seed, temperature=1.0) for seed in (7, 7, 8)]
    ids = [response["output"][-1]["generation_token_ids"] for response in (one, same, other)]
    assert ids[0] == ids[1]


@check
async def bad_requests_are_refused_by_name(server: Server) -> None:
    user = {"role": "user", "content": "q"}
    for param, body in (
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": 0}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("max_tool_calls", {"max_tool_calls": 0}),
        ("input", {"input": 5}),
        ("input", {"input": []}),
        ("input[0]", {"input": [{"content": "q"}]}),
        ("input[0].content[0].type", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("input[0].type", {"input": [{"type": "computer_call", "id": "x"}]}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("tools[1].name", {"tools": [CLOCK, CLOCK]}),
        ("tools", {"tools": [{**CLOCK, "name": f"f{n}"} for n in range(1025)]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "sometimes"}),
        ("tool_choice.name", {"tools": [CLOCK], "tool_choice": {"type": "function", "name": "cloak"}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
        (
            "text.format.schema",
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}},
        ),
        ("text.verbosity", {"text": {"verbosity": "low"}}),
        ("reasoning.summary", {"reasoning": {"summary": "detailed"}}),
        ("truncation", {"truncation": "middle"}),
        ("metadata.k", {"metadata": {"k": 1}}),
        ("metadata", {"metadata": {f"k{n}": "v" for n in range(17)}}),
        ("include[0]", {"include": ["everything"]}),
        ("previous_response_id", {"previous_response_id": "resp_unknown"}),
        ("stop[0]", {"stop": [""]}),
        ("conversation", {"conversation": "conv_1"}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("stream_options.include_obfuscation", {"stream_options": {"include_obfuscation": True}}),
    ):
        await server.refused(param=param, **{"input": [user], **body})
    await server.refused(status=404, param="model", model="gpt-9")
    await server.refused(
        status=404, param="input[0].id", input=[{"type": "item_reference", "id": "msg_1"}, user]
    )


@check
async def broken_bodies_are_refused(server: Server) -> None:
    for body in (b"", b"{", b"[]", b'"q"', b'{"input": "\xff"}', b'{"input": ' + b"[" * 10_000):
        async with server.session.post(f"{server.url}/responses", data=body) as answer:
            judge_error(answer, await answer.json(), status=400, param=None)
