"""Generations read by SGLang's own parsers: through a scripted server, and through the real one."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from support.characters import EOS, CharacterTokens
from support.parsed import shown
from support.replay import ReplayEngine

from backends.loading import PolicyConfig, load_policy
from backends.policy import Policy
from backends.reading import OutputReader, RendererReader
from backends.renderers import RenderingConfig, load_renderer
from backends.rendering import Renderer, TemplateRenderer
from backends.rendering.parsing import make_parser
from backends.rendering.parsing.parts import Call
from backends.sglang import SGLangConfig, SGLangProcess
from backends.sglang.client import SGLangClient
from backends.sglang.facts import Facts
from backends.sglang.parsing.marks import REASONING_PARSERS, TOOL_PARSERS
from backends.sglang.parsing.reader import SGLangReader, open_sglang_reader, sglang_reader
from backends.sglang.parsing.routes import ParseRoutes, SGLangParsers, as_tools
from backends.sglang.parsing.stretches import placed
from gym_sdk import GymClient, Sampling, Task, tool
from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.launch import launch_server
from gym_sdk.schema import FunctionTool, Outcome, Response, ResponseRequest

pytestmark = pytest.mark.timeout(120)

real = pytest.mark.sglang

TOOLS = [
    FunctionTool(
        name=name,
        parameters={"type": "object", "properties": {"s": {"type": "string"}, "i": {"type": "integer"}}},
    )
    for name in ("f", "g")
]


class Letters(CharacterTokens):
    """The part of a renderer that reading needs: a token for each character."""

    stop_token_ids = frozenset({EOS})


LETTERS: Any = Letters()


def ids(text: str, *, finished: bool = True) -> list[int]:
    return [*LETTERS.encode(text), *([EOS] if finished else [])]


def arguments_of(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The same with arguments in one spelling."""
    return [(*row[:2], json.dumps(json.loads(row[2]))) if row[0] == "call" else row for row in rows]


# --- a scripted server


class Scripted:
    """Parses as SGLang's `hermes` and `qwen3` do: what stands after a call, or is not on offer, is lost."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: Any = None
        self.status = 200

    async def parse(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((request.path, body))
        if body.get("tool_call_parser", body.get("reasoning_parser")) not in ("hermes", "qwen3"):
            return web.json_response({"error": {"message": "Unsupported"}}, status=500)
        if self.answer is not None or self.status != 200:
            return web.json_response(self.answer, status=self.status)
        return web.json_response(
            self.calls(body) if request.path == "/parse_function_call" else self.thoughts(body["text"])
        )

    @staticmethod
    def calls(body: dict[str, Any]) -> dict[str, Any]:
        names = {one["function"]["name"] for one in body["tools"]}
        try:
            found = [
                json.loads(one) for one in re.findall("<tool_call>(.*?)</tool_call>", body["text"], re.S)
            ]
        except ValueError:
            return {"normal_text": body["text"], "calls": []}
        calls = [
            {"tool_index": 0, "name": one["name"], "parameters": json.dumps(one["arguments"])}
            for one in found
            if one["name"] in names
        ]
        before, mark, _ = body["text"].partition("<tool_call>")
        return {"normal_text": before.strip() if mark else before, "calls": calls}

    @staticmethod
    def thoughts(text: str) -> dict[str, Any]:
        if "<think>" not in text:
            return {"blocks": [{"type": "text", "text": text}]}
        thought, _, rest = text.removeprefix("<think>").partition("</think>")
        blocks = [{"type": "reasoning", "text": thought}] if thought else []
        return {"blocks": [*blocks, {"type": "text", "text": rest}]}

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"tool_call_parser": "hermes", "reasoning_parser": None})

    @asynccontextmanager
    async def client(self) -> AsyncIterator[SGLangClient]:
        app = web.Application()
        app.router.add_post("/parse_function_call", self.parse)
        app.router.add_post("/separate_reasoning", self.parse)
        app.router.add_get("/server_info", self.info)
        async with TestServer(app) as server:
            client = SGLangClient(str(server.make_url("/")))
            try:
                yield client
            finally:
                await client.aclose()


@pytest_asyncio.fixture
async def scripted() -> Scripted:
    return Scripted()


CALL = '<tool_call>\n{"name": "f", "arguments": {"i":1}}\n</tool_call>'


def test_names() -> None:
    assert SGLangParsers.of("sglang:hermes") == SGLangParsers("hermes")
    assert SGLangParsers.of("sglang:hermes+qwen3") == SGLangParsers("hermes", "qwen3")
    assert SGLangParsers.of("sglang:+qwen3") == SGLangParsers(None, "qwen3")
    for parsers in (SGLangParsers("a"), SGLangParsers("a", "b"), SGLangParsers(None, "b")):
        assert SGLangParsers.of(str(parsers)) == parsers
    for wrong in ("sglang:", "sglang:+", "sglang:a+", "hermes"):
        with pytest.raises(ConfigurationError, match="sglang:TOOL"):
            SGLangParsers.of(wrong)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("hello", [("text", "hello")]),
        ("", [("text", "")]),
        (
            f" a {CALL} b {CALL} c",
            [
                ("text", " a "),
                ("call", "f", '{"i": 1}'),
                ("text", " b "),
                ("call", "f", '{"i": 1}'),
                ("text", " c"),
            ],
        ),
        (
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            [("call", "unknown", "{}")],
        ),
        (
            f"{CALL}<tool_call>no JSON</tool_call>",
            [("call", "f", '{"i": 1}'), ("text", "<tool_call>no JSON</tool_call>")],
        ),
        (
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            [("text", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>')],
        ),
        (
            f"<think>\none\n</think>\n{CALL}",
            [("think", "\none\n"), ("call", "f", '{"i": 1}')],
        ),
        (
            "so <think>one</think> two <think>three</think> four",
            [("text", "so "), ("think", "one"), ("text", " two "), ("think", "three"), ("text", " four")],
        ),
        ("<think></think>a", [("think", ""), ("text", "a")]),
        ("<think></think>", [("think", "")]),
        ("<think>never closed", [("think", "never closed")]),
        (
            '<tool_call>{"name": "f", "arguments": {"s": "<think>"}}</tool_call>',
            [("call", "f", '{"s": "<think>"}')],
        ),
    ],
)
async def test_nothing_that_was_sampled_is_lost(
    scripted: Scripted, text: str, rows: list[tuple[str, ...]]
) -> None:
    async with scripted.client() as client:
        reader = SGLangReader(client, SGLangParsers("hermes", "qwen3"), LETTERS)
        output = await reader.read(ids(text), prompt=ids("say"), tools=TOOLS)
        again = await reader.read(ids(text), prompt=ids("say"), tools=TOOLS)
    assert shown(output.items) == rows
    assert output.unparsed_calls == sum(row[1].startswith("<tool_call>") for row in rows)
    assert [item.id for item in output.items] != [item.id for item in again.items]


@pytest.mark.asyncio
async def test_a_call_that_was_cut_is_text_and_not_asked_about(scripted: Scripted) -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}'
    async with scripted.client() as client:
        reader = SGLangReader(client, SGLangParsers("hermes"), LETTERS)
        output = await reader.read(ids(text, finished=False), tools=TOOLS)
    assert shown(output.items) == [("text", text)]
    assert output.unparsed_calls == 1
    assert not scripted.asked


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("<user>hi<assistant><think>\n", [("think", "one"), ("text", "two")]),
        ("<user>hi<assistant><think>\n\n</think>\n\n", [("text", "one</think>two")]),
        ("<user>what is <think>?<assistant>", [("text", "one</think>two")]),
    ],
)
async def test_the_prompt_says_whether_thinking_is_open(
    scripted: Scripted, prompt: str, rows: list[tuple[str, ...]]
) -> None:
    async with scripted.client() as client:
        reader = SGLangReader(client, SGLangParsers(None, "qwen3"), LETTERS)
        output = await reader.read(ids("one</think>two"), prompt=LETTERS.encode(prompt))
    assert shown(output.items) == rows
    assert output.reasoning_tokens == (len("one</think>") if len(rows) == 2 else 0)


@pytest.mark.parametrize(
    ("sent", "blocks", "stretches"),
    [
        ("<think>think</think>x", [(True, "think"), (False, "x")], [(True, "think", 20), (False, "x", 21)]),
        (
            "a <x>b</x> c",
            [(False, "a "), (True, "b")],
            [(False, "a ", 2), (True, "b", 6), (False, "</x> c", 12)],
        ),
        ("<think>one</think>two", [(True, "one")], [(True, "one", 10), (False, "</think>two", 21)]),
        ("<think>one", [(True, "ONE")], [(False, "<think>one", 10)]),
        ("one", [(False, "<think>one")], [(False, "one", 3)]),
        ("one two", [], [(False, "one two", 7)]),
    ],
)
def test_blocks_are_placed_so_that_nothing_is_lost(
    sent: str, blocks: list[tuple[bool, str]], stretches: list[tuple[bool, str, int]]
) -> None:
    found = placed(blocks, sent, "<think>")
    assert [(one.thought, one.text, one.end) for one in found] == stretches


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("parsers", "answer"),
    [
        (SGLangParsers("hermes"), ["nothing"]),
        (SGLangParsers("hermes"), {"normal_text": "a"}),
        (SGLangParsers("hermes"), {"normal_text": "a", "calls": [{"name": "f"}]}),
        (SGLangParsers("hermes"), {"normal_text": "a", "calls": [{"name": "f", "parameters": {}}]}),
        (SGLangParsers("hermes"), {"normal_text": None, "calls": []}),
        (SGLangParsers(None, "qwen3"), {"text": "a"}),
        (SGLangParsers(None, "qwen3"), {"blocks": [{"type": "other", "text": "a"}]}),
    ],
)
async def test_an_answer_that_is_wrong_is_an_error(
    scripted: Scripted, parsers: SGLangParsers, answer: object
) -> None:
    scripted.answer = answer
    route = "parse_function_call" if parsers.tool else "separate_reasoning"
    async with scripted.client() as client:
        with pytest.raises(TransportError, match=route) as caught:
            await SGLangReader(client, parsers, LETTERS).read(ids("<think>a"), tools=TOOLS)
    assert not caught.value.retryable


@pytest.mark.asyncio
@pytest.mark.parametrize(("status", "retryable"), [(400, False), (401, False), (500, True), (503, True)])
async def test_a_refusal_is_not_the_clients(scripted: Scripted, status: int, retryable: bool) -> None:
    scripted.answer, scripted.status = {"error": {"message": "no"}}, status
    async with scripted.client() as client:
        with pytest.raises(TransportError, match="parse_function_call") as caught:
            await SGLangReader(client, SGLangParsers("hermes"), LETTERS).read(ids("a"), tools=TOOLS)
    assert caught.value.retryable is retryable


@pytest.mark.asyncio
async def test_an_sglang_that_is_gone_can_be_asked_again() -> None:
    client = SGLangClient(f"http://127.0.0.1:{unused_port()}", config=SGLangConfig(refused_retries=0))
    with pytest.raises(TransportError) as caught:
        await SGLangReader(client, SGLangParsers("hermes"), LETTERS).read(ids("a"), tools=TOOLS)
    await client.aclose()
    assert caught.value.retryable


@pytest.mark.asyncio
async def test_unknown_parsers_are_refused_at_start(scripted: Scripted) -> None:
    async with scripted.client() as client:
        await open_sglang_reader(client, SGLangParsers("hermes", "qwen3"), LETTERS)
        with pytest.raises(ConfigurationError, match=r"tool parser 'hermit'.*glm45, .*hermes"):
            await open_sglang_reader(client, SGLangParsers("hermit"), LETTERS)
        with pytest.raises(ConfigurationError, match=r"reasoning parser 'qwen9'.*qwen3"):
            await open_sglang_reader(client, SGLangParsers("hermes", "qwen9"), LETTERS)


def test_other_backends_refuse_them_by_name(untrained_policy: Path) -> None:
    config = PolicyConfig(str(untrained_policy), rendering=RenderingConfig(parser="sglang:hermes"))
    with pytest.raises(ConfigurationError, match=r"'sglang:hermes' is SGLang's"):
        load_policy(config)
    with pytest.raises(ConfigurationError, match=r"'sglang:hermes' is SGLang's"):
        make_parser("sglang:hermes", LETTERS, frozenset())


@pytest.mark.asyncio
async def test_what_sglang_was_started_with_is_used_where_nothing_here_reads(
    scripted: Scripted, untrained_policy: Path
) -> None:
    found = load_renderer(untrained_policy, RenderingConfig())
    none = load_renderer(untrained_policy, RenderingConfig(parser="sglang:hermes"))
    assert (RendererReader(found).name, RendererReader(none).name) == ("hermes", "none")

    async def chosen(renderer: Renderer, parser: str | None, **started: str) -> str | None:
        facts = Facts("0.5.23", 100, 100, "0", "model", None, False, False, **started)  # type: ignore[arg-type]
        reader = await sglang_reader(client, facts, renderer, parser)
        return reader.name if reader is not None else None

    async with scripted.client() as client:
        assert await chosen(found, None, tool_parser="hermes") is None
        assert await chosen(none, None, tool_parser="hermes") == "sglang:hermes"
        assert await chosen(none, None, reasoning_parser="qwen3") == "sglang:+qwen3"
        assert await chosen(none, "none", tool_parser="hermes") is None
        assert await chosen(none, "sglang:hermes+qwen3") == "sglang:hermes+qwen3"
        assert await chosen(none, None) is None


# --- the policy over it


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"i": {}}}}


@pytest.fixture(scope="module")
def renderer(untrained_policy: Path) -> TemplateRenderer:
    return TemplateRenderer.from_folder(untrained_policy, parser="none")


async def ask(policy: Policy, items: Sequence[Any]) -> Response:
    return await policy.respond(ResponseRequest.model_validate({"input": list(items), "tools": [TOOL]}))


async def first_turns(
    renderer: TemplateRenderer, reader: OutputReader
) -> tuple[list[dict[str, Any]], list[int], Policy]:
    """A conversation of two answers; the items with tokens, all tokens, and the policy."""
    said = [f"<think>\nadd\n</think>\n\nWell {CALL} then<|im_end|>", f"{CALL}<|im_end|>", "3.<|im_end|>"]
    policy = Policy(ReplayEngine([renderer.encode(text) for text in said]), renderer, reader=reader)
    items: list[dict[str, Any]] = [{"role": "user", "content": "1 + 2 ="}]
    tokens: list[int] = []
    for _ in range(2):
        response = await ask(policy, items)
        assert response.fork is None
        assert response.tokens is not None
        assert response.tokens.prompt_token_ids[: len(tokens)] == tokens
        tokens = response.tokens.token_ids
        output = response.in_form("item")["output"]
        items += output
        items += [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "3"}
            for item in output
            if item["type"] == "function_call"
        ]
    return items, tokens, policy


@pytest.mark.asyncio
async def test_conversations_over_such_items_extend_what_was_sampled(
    scripted: Scripted, renderer: TemplateRenderer
) -> None:
    async with scripted.client() as client:
        reader = SGLangReader(client, SGLangParsers("hermes", "qwen3"), renderer)
        items, tokens, policy = await first_turns(renderer, reader)
        count = len(scripted.asked)
        response = await ask(policy, items)
        assert response.tokens is not None
        assert response.tokens.prompt_token_ids[: len(tokens)] == tokens
        assert len(scripted.asked) == count + 1  # "3." alone: what was read before is not read again
    assert [item["type"] for item in items[1:]] == [
        *("reasoning", "message", "function_call", "message", "function_call_output"),
        *("function_call", "function_call_output"),
    ]
    assert policy.stats.forks == 0
    assert policy.stats.bridges == 2


@pytest.mark.asyncio
async def test_after_a_restart_the_history_is_read_again_and_proven(
    scripted: Scripted, renderer: TemplateRenderer
) -> None:
    async with scripted.client() as client:
        parsers = SGLangParsers("hermes", "qwen3")
        items, tokens, _ = await first_turns(renderer, SGLangReader(client, parsers, renderer))
        for edited in (False, True):
            engine = ReplayEngine([renderer.encode("3.<|im_end|>")])
            policy = Policy(engine, renderer, reader=SGLangReader(client, parsers, renderer))
            history = json.loads(json.dumps(items))
            if edited:
                history[2]["content"][0]["text"] = "Never said"
            response = await ask(policy, history)
            assert response.tokens is not None
            assert (response.tokens.prompt_token_ids[: len(tokens)] == tokens) is not edited
            assert (response.fork is None) is not edited


@pytest.mark.asyncio
async def test_a_history_that_cannot_be_read_is_an_error_not_a_guess(
    scripted: Scripted, renderer: TemplateRenderer
) -> None:
    async with scripted.client() as client:
        reader = SGLangReader(client, SGLangParsers("hermes"), renderer)
        items, _, _ = await first_turns(renderer, reader)
        engine = ReplayEngine([renderer.encode("3.<|im_end|>")])
        policy = Policy(engine, renderer, reader=SGLangReader(client, SGLangParsers("hermes"), renderer))
        scripted.status = 503
        with pytest.raises(TransportError):
            await ask(policy, items)


# --- the real SGLang


@pytest_asyncio.fixture(loop_scope="session")
async def client(sglang: SGLangProcess) -> AsyncIterator[SGLangClient]:
    client = SGLangClient(sglang.url)
    yield client
    await client.aclose()


DEEPSEEK = (
    "<\uff5ctool▁call▁begin\uff5c>function<\uff5ctool▁sep\uff5c>%s\n"
    "```json\n%s\n```<\uff5ctool▁call▁end\uff5c>"
)


def deepseek(*calls: tuple[str, str]) -> str:
    inner = "\n".join(DEEPSEEK % one for one in calls)
    return f"<\uff5ctool▁calls▁begin\uff5c>{inner}<\uff5ctool▁calls▁end\uff5c>"


def kimi(*calls: tuple[str, str]) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


ONE, TWO, TEXT = '{"i": 1}', '{"i": 2}', '{"s": "x"}'
HERMES = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
XML = "<tool_call>\n<function=%s>\n<parameter=i>\n%s\n</parameter>\n</function>\n</tool_call>"
GLM = "<tool_call>%s\n<arg_key>i</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>"

CASES: list[tuple[str, str | None, str, list[tuple[str, ...]]]] = [
    *(
        (
            name,
            "hermes",
            f"a {HERMES % ('f', ONE)} b {HERMES % ('g', TEXT)} c",
            [
                ("text", "a "),
                ("call", "f", '{"i": 1}'),
                ("text", " b "),
                ("call", "g", '{"s": "x"}'),
                ("text", " c"),
            ],
        )
        for name in ("hermes", "qwen25")
    ),
    ("hermes", "hermes", HERMES % ("unknown", "{}"), [("call", "unknown", "{}")]),
    ("qwen25", "hermes", HERMES % ("f", "{"), [("text", HERMES % ("f", "{"))]),
    (
        "qwen3_coder",
        "qwen3_coder",
        f"a {XML % ('f', 1)} b {XML % ('unknown', 'x')}",
        [("text", "a "), ("call", "f", '{"i": 1}'), ("text", " b "), ("call", "unknown", '{"i": "x"}')],
    ),
    (
        "glm45",
        "glm45",
        f"a {GLM % ('f', 1)} b {GLM % ('g', 2)}",
        [("text", "a "), ("call", "f", '{"i": 1}'), ("text", " b "), ("call", "g", '{"i": 2}')],
    ),
    (
        "llama3",
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {"i": 1}}',
        [("call", "f", '{"i": 1}')],
    ),
    (
        "llama3",
        "llama3_json",
        '{"name": "unknown", "parameters": {"i": 1}}',
        [("call", "unknown", '{"i": 1}')],
    ),
    (
        "mistral",
        "mistral",
        'a [TOOL_CALLS] [{"name": "f", "arguments": {"i": 1}}, {"name": "unknown", "arguments": {}}]',
        [("text", "a "), ("call", "f", '{"i": 1}'), ("call", "unknown", "{}")],
    ),
    (
        "pythonic",
        None,
        'a [f(i=1, s="x"), g(i=2)] b',
        [("text", "a "), ("call", "f", '{"i": 1, "s": "x"}'), ("call", "g", '{"i": 2}'), ("text", " b")],
    ),
    (
        "deepseekv3",
        "deepseek_v3",
        f"a {deepseek(('f', ONE), ('g', TWO))} b",
        [("text", "a "), ("call", "f", '{"i": 1}'), ("call", "g", '{"i": 2}'), ("text", " b")],
    ),
    (
        "deepseekv3",
        "deepseek_v3",
        deepseek(("f", '{"i": 1}'), ("unknown", "{}")),
        [("call", "f", '{"i": 1}'), ("call", "unknown", "{}")],
    ),
    (
        "kimi_k2",
        "kimi_k2",
        f"a {kimi(('f', ONE), ('g', TWO))} b",
        [("text", "a "), ("call", "f", '{"i": 1}'), ("call", "g", '{"i": 2}'), ("text", " b")],
    ),
    (
        "deepseekv3",
        "deepseek_v3",
        deepseek(("f", ONE), ("g", TWO)).replace("\n<\uff5c", " so \n<\uff5c"),
        [("call", "f", ONE), ("text", " so \n"), ("call", "g", TWO)],
    ),
    (
        "deepseekv3",
        None,
        deepseek(("f", "{"), ("g", "{}")),
        [("text", DEEPSEEK % ("f", "{") + "\n"), ("call", "g", "{}")],
    ),
    (
        "kimi_k2",
        None,
        kimi(("f", "{"), ("g", "{}")),
        [
            (
                "text",
                "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{<|tool_call_end|>",
            ),
            ("call", "g", "{}"),
        ],
    ),
    ("hermes", "hermes", HERMES % ("f", '"{}"'), [("call", "f", "{}")]),
    ("mistral", "mistral", 'a [TOOL_CALLS]f[ARGS]{"i": 1}', [("text", "a "), ("call", "f", ONE)]),
    (
        "llama3",
        "llama3_json",
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}} done',
        [("call", "f", "{}"), ("call", "g", "{}"), ("text", " done")],
    ),
    (
        "lfm2",
        None,
        "a <|tool_call_start|>[f(i=1)]<|tool_call_end|> b",
        [("text", "a "), ("call", "f", '{"i": 1}'), ("text", " b")],
    ),
    *((name, "hermes", "just {words}", [("text", "just {words}")]) for name in ("hermes", "llama3", "glm45")),
]


@real
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(("name", "ours", "text", "rows"), CASES)
async def test_the_real_tool_parsers(
    client: SGLangClient, name: str, ours: str | None, text: str, rows: list[tuple[str, ...]]
) -> None:
    reader = await open_sglang_reader(client, SGLangParsers(name), LETTERS)
    output = await reader.read(ids(text), prompt=ids("say"), tools=TOOLS)
    assert arguments_of(shown(output.items)) == arguments_of(rows)
    if ours is not None:
        parser = make_parser(ours, LETTERS, LETTERS.stop_token_ids)
        theirs = parser.parse(ids(text), prompt=ids("say"), tools=TOOLS)
        assert arguments_of(shown(theirs.items)) == arguments_of(rows)
        assert theirs.unparsed_calls == output.unparsed_calls


UNCLOSED = '<tool_call>{"name": "f", "arguments": {}}'
LISTED = '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>'
ONE_LINE = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
SPACED = "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value> 12 </arg_value>\n</tool_call>"
CUT = '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g"'
F = ("call", "f", "{}")

DIFFERENCES: list[tuple[str, str, str, list[tuple[str, ...]], list[tuple[str, ...]]]] = [
    # JSON is written anew: numbers, escapes and keys that occur twice
    (
        "hermes",
        "hermes",
        HERMES % ("f", '{"i":1e2, "s":"\\u00e9", "i":3}'),
        [("call", "f", '{"i": 3, "s": "\u00e9"}')],
        [("call", "f", '{"i":1e2, "s":"\\u00e9", "i":3}')],
    ),
    # a finished turn may leave a call open
    ("hermes", "hermes", UNCLOSED, [F], [("text", UNCLOSED)]),
    ("hermes", "hermes", LISTED, [F], [("text", LISTED)]),
    # `parameters` pass for arguments
    (
        "hermes",
        "hermes",
        '<tool_call>{"name": "f", "parameters": {"i": 1}}</tool_call>',
        [("call", "f", ONE)],
        [F],
    ),
    # qwen25 insists on the line breaks
    ("qwen25", "hermes", ONE_LINE, [("text", ONE_LINE)], [F]),
    # types where the schema says none, and blanks
    (
        "qwen3_coder",
        "qwen3_coder",
        XML % ("unknown", 2),
        [("call", "unknown", '{"i": "2"}')],
        [("call", "unknown", TWO)],
    ),
    (
        "qwen3_coder",
        "qwen3_coder",
        XML % ("f", " 1.0 "),
        [("call", "f", '{"i": " 1.0 "}')],
        [("call", "f", '{"i": 1.0}')],
    ),
    ("glm45", "glm45", SPACED, [("call", "f", '{"s": "12"}')], [("call", "f", '{"s": " 12 "}')]),
    # a list that was cut
    ("mistral", "mistral", CUT, [("text", CUT)], [F, ("text", ' {"name": "g"')]),
]


@real
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(("name", "ours", "text", "sglangs", "own"), DIFFERENCES)
async def test_where_they_differ_from_our_own(
    client: SGLangClient,
    name: str,
    ours: str,
    text: str,
    sglangs: list[tuple[str, ...]],
    own: list[tuple[str, ...]],
) -> None:
    reader = await open_sglang_reader(client, SGLangParsers(name), LETTERS)
    output = await reader.read(ids(text), prompt=ids("say"), tools=TOOLS)
    theirs = make_parser(ours, LETTERS, LETTERS.stop_token_ids).parse(
        ids(text), prompt=ids("say"), tools=TOOLS
    )
    assert (shown(output.items), shown(theirs.items)) == (sglangs, own)


HARMONY = (
    "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"i": 1}'
)


@real
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("text", "rows", "unparsed"),
    [
        (HARMONY + "<|call|>", [("think", "one"), ("call", "f", ONE)], 0),
        (HARMONY, [("think", "one"), ("text", HARMONY[HARMONY.index("<|end|>") :])], 1),
        (
            "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>final<|message|>two<|call|>",
            [("think", "one"), ("text", "two")],
            0,
        ),
    ],
)
async def test_a_format_whose_stop_token_closes_calls(
    client: SGLangClient, text: str, rows: list[tuple[str, ...]], unparsed: int
) -> None:
    marked: Any = CharacterTokens(["<|call|>"])
    marked.stop_token_ids = frozenset(marked.encode("<|call|>"))
    reader = await open_sglang_reader(client, SGLangParsers("gpt-oss", "gpt-oss"), marked)
    output = await reader.read(marked.encode(text), tools=TOOLS)
    assert shown(output.items) == rows
    assert output.unparsed_calls == unparsed


@real
@pytest.mark.asyncio(loop_scope="session")
async def test_what_the_routes_lose_by_themselves(client: SGLangClient) -> None:
    """If this fails, SGLang keeps more than it did, and some of what is done here may go."""
    routes = ParseRoutes(client, SGLangParsers("hermes"))
    tools = as_tools(["f"])
    text = f"a {ONE_LINE} b"
    assert await routes.ask_calls(text, tools) == ("a", [Call("f", "{}")])
    assert await routes.ask_calls(text, as_tools(["g"])) == ("a", [])
    assert await routes.ask_calls(text, []) == (text, [])
    assert await routes.ask_calls("<tool_call>{</tool_call>" + ONE_LINE, tools) == (
        "<tool_call>{</tool_call>" + ONE_LINE,
        [],
    )
    qwen = ParseRoutes(client, SGLangParsers("qwen25"))
    broken = HERMES % ("f", "{")
    assert await qwen.ask_calls(broken + HERMES % ("f", "{}"), tools) == ("", [Call("f", "{}")])
    thinking = ParseRoutes(client, SGLangParsers(None, "qwen3"))
    assert await thinking.ask_reasoning("one</think>two") == [(False, "one</think>two")]
    assert await thinking.ask_reasoning("a <think>one</think>") == [(True, "a <think>one")]


@real
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1", "glm45", "kimi_k2", "deepseek-v3"])
@pytest.mark.parametrize(
    ("prompt", "text", "rows"),
    [
        (
            "say",
            f"<think>\none\n</think>\n\n{HERMES % ('f', ONE)}",
            [("think", "\none\n"), ("call", "f", ONE)],
        ),
        ("<think>\n", "one</think>two", [("think", "one"), ("text", "two")]),
        ("<think>\n", "never closed", [("think", "never closed")]),
        ("<think>\n\n</think>\n\n", "no thought", [("text", "no thought")]),
        ("say", "a <think>one</think> b", [("text", "a "), ("think", "one"), ("text", " b")]),
        ("say", "<think></think>a", [("think", ""), ("text", "a")]),
    ],
)
async def test_the_real_reasoning_parsers(
    client: SGLangClient, name: str, prompt: str, text: str, rows: list[tuple[str, ...]]
) -> None:
    reader = await open_sglang_reader(client, SGLangParsers("hermes", name), LETTERS)
    output = await reader.read(ids(text), prompt=LETTERS.encode(prompt), tools=TOOLS)
    assert shown(output.items) == rows
    parser = make_parser("hermes", LETTERS, LETTERS.stop_token_ids)
    theirs = parser.parse(ids(text), prompt=LETTERS.encode(prompt), tools=TOOLS)
    assert shown(theirs.items) == rows


@real
@pytest.mark.asyncio(loop_scope="session")
async def test_every_parser_that_is_listed_can_be_opened(client: SGLangClient) -> None:
    refused: set[str] = set()
    for parsers in [
        *(SGLangParsers(name) for name in TOOL_PARSERS),
        *(SGLangParsers(None, name) for name in REASONING_PARSERS),
    ]:
        try:
            await open_sglang_reader(client, parsers, LETTERS)
        except ConfigurationError:
            refused.add(str(parsers))
    # these take what they need from the model that is served
    assert refused == {
        *("sglang:beam", "sglang:response_template", "sglang:+response_template"),
        *("sglang:deepseekv4", "sglang:deepseekv41", "sglang:+deepseek-v4", "sglang:+deepseek-v41"),
        *("sglang:glm47", "sglang:iquest_q1"),  # the route fails: its tools lack what these ask of them
    }
    with pytest.raises(ConfigurationError, match="tool parser 'hermit'"):
        await open_sglang_reader(client, SGLangParsers("hermit"), LETTERS)


@tool
def calculator(expression: str) -> str:
    """Add numbers."""
    return str(sum(int(number) for number in expression.replace("- ", "+ -").split("+")))


@real
@pytest.mark.asyncio(loop_scope="session")
async def test_rollouts_read_by_sglang_are_exact(
    sglang: SGLangProcess, tiny_policy: Path, tmp_path: Path
) -> None:
    arguments = ["--backend", "sglang", "--sglang-url", sglang.url, "--parser", "sglang:hermes+qwen3"]
    question = "State the final answer to the following arithmetic problem: {} + 5 ="
    async with (
        launch_server(tiny_policy, arguments=arguments, log=tmp_path / "server.log") as url,
        GymClient(url, model="policy") as gym,
    ):
        found = await gym.collect(
            [Task(question.format(number)) for number in range(8)],
            tools=[calculator],
            group_size=2,
            sampling=Sampling(max_output_tokens=96),
        )
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{url.removesuffix('/v1')}/health") as answer,
        ):
            health = await answer.json()
    assert health["parser"] == "sglang:hermes+qwen3"
    assert {rollout.outcome for rollout in found.rollouts} <= {Outcome.COMPLETED, Outcome.TRUNCATED}
    assert any(len(rollout.model_calls) > 1 for rollout in found.rollouts)
    numbers = found.summary()
    assert numbers["forks"] == numbers["unreported_forks"] == 0
    assert numbers["sequences"] == 16
    assert numbers["trained_share"] == 1.0
