"""What each format's parser makes of a generation, with markup as tokens and spelled out."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.characters import EOS, CharacterTokens
from support.generations import CASES, short
from support.markup import MARKS, THINK
from support.parsed import shown

from backends.rendering.parsing import PARSERS, ParsedOutput, make_parser
from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import FunctionCall, FunctionTool

TOOLS = [
    FunctionTool(
        name="f",
        parameters={
            "$defs": {"unit": {"enum": ["1", "2"]}, "point": {"type": "object"}},
            "properties": {
                "s": {"type": "string"},
                "n": {"type": "number"},
                "i": {"type": "integer"},
                "b": {"type": "boolean"},
                "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "u": {"$ref": "#/$defs/unit"},
                "p": {"$ref": "#/$defs/point"},
            },
        },
    )
]


def run(name: str, text: str, *, special: bool = True, stop: bool = True) -> ParsedOutput:
    tokens = CharacterTokens((*MARKS[name], *THINK) if special else ())
    parser = make_parser(name, tokens, frozenset({EOS}))
    assert parser.name == name
    return parser.parse(tokens.encode(text) + [EOS] * stop, tools=TOOLS)


BROKEN: list[tuple[str, str]] = [
    ("qwen3_coder", "<tool_call><function=f><parameter=s>1</parameter>"),
    ("qwen3_coder", "<tool_call><function=f><parameter=s>1</function></tool_call>"),
    ("qwen3_coder", "<tool_call>{}</tool_call>"),
    ("glm45", "<tool_call>f<arg_key>s</arg_key></tool_call>"),
    ("glm45", "<tool_call>f<arg_key>s</arg_key><arg_value>1"),
    ("glm45", "<tool_call><arg_key>s</arg_key><arg_value>1</arg_value></tool_call>"),
    ("llama3_json", '{"name": "f", "parameters": {"a"'),
    ("llama3_json", "<|python_tag|>import os; os.listdir()"),
    ("pythonic", "«P[f(1)]P»"),
    ("pythonic", "«P[f(a=g())]P»"),
    ("pythonic", "«P[f(a=1e999)]P»"),
    ("pythonic", "«P[f(**{'a': 1})]P»"),
    ("pythonic", "«P[f(a=" + "-" * 20_000 + "1)]P»"),
    ("pythonic", "«P[f(a=1" + "+1" * 20_000 + ")]P»"),
    ("pythonic", "«P" + "[" * 300 + "P»"),
    ("pythonic", "«P[f(a=1"),
    ("mistral", '[TOOL_CALLS][{"name": "f"'),
    ("mistral", "[TOOL_CALLS]f[ARGS]{"),
    ("mistral", "[TOOL_CALLS]f[ARGS]1"),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]a[CALL_ID]b[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]"),
    ("deepseek_v3", "«DD»"),
    ("deepseek_v3", "«D«dfunction|sep|f\n```json\n{oops}\n```d»D»"),
    ("deepseek_v3", "«D«dfd»D»"),
    ("kimi_k2", "«K«kfunctions.f:0|arg|{"),
    ("kimi_k2", "«K«kfunctions.f:0|arg|{a}k»K»"),
    ("kimi_k2", "«K«k|arg|{}k»K»"),
    ("kimi_k2", "«K«kfunctions.f:0|arg|" + "[" * 100_000 + "k»K»"),
    ("gpt_oss", "<|channel|>commentary to=functions.f<|message|>{oops}<|call|>"),
    ("gpt_oss", '<|channel|>commentary to=functions.f<|message|>{"a": 1'),
    ("gemma4", "«Gf{a:1"),
    ("gemma4", "«Gf{a:1}"),
    ("gemma4", "«Gf{a:1}}G»"),
    ("gemma4", "«Gf{a:1,}G»"),
    ("gemma4", "«Gf{a}G»"),
    ("gemma4", "«Gf{a:word}G»"),
    ("gemma4", "«Gf{a:NaN}G»"),
    ("gemma4", "«Gf{a:01}G»"),
    ("gemma4", "«Gf{a:" + "1" * 5_000 + "}G»"),
    ("gemma4", "«Gf{a:~x}G»"),
    ("gemma4", "«Gf{a:~x~y}G»"),
    ("gemma4", '«Gf{a:"b ~,c:~"}G»'),
    ("gemma4", '«Gf{a:"b}G»'),
    ("gemma4", '«Gf{a:"\\x"}G»'),
    ("gemma4", "«Gf{a:[1 2]}G»"),
    ("gemma4", "«Gf{a,b:1}G»"),
    ("gemma4", "«Gf{a:<|channel>}G»"),
    ("gemma4", "«Gf[1]G»"),
    ("gemma4", "«G{}G»"),
    ("gemma4", "<|tool_call>G»"),
    ("gemma4", "«Gf{a:" + "[" * 100_000 + "G»"),
    ("gemma4", "«Gf{a:" + "[" * 100 + "]" * 100 + "}G»"),
    ("atem", " to=f<|message|>{}<|eot|>"),
    ("atem", ' to=f<|message|>«A<i:"f"><p:"a">1'),
    ("atem", ' to=f<|message|>so «A<i:"f"><p:"a">1</p:></i:>'),
    ("atem", ' to=f<|message|>«A<i:"f">1</i:>A»'),
    ("atem", " to=f<|message|>«AA»"),
    ("minimax_m2", '«M<invoke name="f"></invoke>'),
    ("minimax_m2", '«M<invoke name="f"><parameter name="s">1</invoke>M»'),
    ("minimax_m2", "«MM»"),
    ("minimax_m2", '«M{"name": "f"}M»'),
]


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "spelled out"])
@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_calls(name: str, text: str, expected: list[tuple[str, ...]], special: bool) -> None:
    output = run(name, short(text), special=special)
    expected = [(kind, *map(short, content)) for kind, *content in expected]
    assert shown(output.items) == expected
    assert output.unparsed_calls == 0
    assert shown(run(name, short(text), special=special, stop=False).items) == expected


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "spelled out"])
@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_what_does_not_parse_stays_text(name: str, text: str, special: bool) -> None:
    output = run(name, short(text), special=special)
    assert shown(output.items) == [("text", short(text))]
    assert output.unparsed_calls == 1


@pytest.mark.parametrize("name", [name for name in MARKS if MARKS[name]])
def test_markup_spelled_out_is_text_where_the_tokenizer_has_the_tokens(name: str) -> None:
    tokens = CharacterTokens((*MARKS[name], *THINK))
    parser = make_parser(name, tokens, frozenset({EOS}))
    texts = [short(text) for case, text, _ in CASES if case == name]
    marked = [text for text in texts if any(mark in text for mark in MARKS[name])]
    assert marked or name == "hermes"
    for text in marked:
        assert shown(parser.parse(tokens.spell(text)).items) == [("text", text)]


def test_broken_calls_stay_where_they_stand() -> None:
    text = short("«K«kfunctions.f:0|arg|{}k» «kbroken k»«kfunctions.g:1|arg|{}k»«kcut")
    output = run("kimi_k2", text)
    assert shown(output.items) == [
        ("call", "f", "{}"),
        ("text", short(" «kbroken k»")),
        ("call", "g", "{}"),
        ("text", short("«kcut")),
    ]
    assert output.unparsed_calls == 2
    output = run("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"na')
    assert shown(output.items) == [("call", "f", "{}"), ("text", ' {"na')]
    assert output.unparsed_calls == 1
    output = run("atem", short(' to=f<|message|>a «A<i:"f"></i:><i:"g">A» b «A<i:"h"></i:>A»'))
    rest = short('<i:"g">A» b «A<i:"h"></i:>A»')
    assert shown(output.items) == [("text", "a "), ("call", "f", "{}"), ("text", rest)]
    assert output.unparsed_calls == 1
    output = run("minimax_m2", short('a «M<invoke name="f"></invoke><invoke name="g">M» b'))
    rest = short('<invoke name="g">M» b')
    assert shown(output.items) == [("text", "a "), ("call", "f", "{}"), ("text", rest)]
    assert output.unparsed_calls == 1


def call_ids(output: ParsedOutput) -> list[str]:
    return [item.call_id for item in output.items if isinstance(item, FunctionCall)]


def test_sampled_call_ids_are_kept_once() -> None:
    text = short("«K«kfunctions.f:0|arg|{}k»«kfunctions.f:0|arg|{}k»«kf|arg|{}k»K»")
    first, *others = call_ids(run("kimi_k2", text))
    assert first == "functions.f:0"
    assert all(re.fullmatch(r"call_\w{24}", call_id) for call_id in others)
    listed = '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcDEF123"}, {"name": "f", "id": "1"}]'
    first, second = call_ids(run("mistral", listed))
    assert first == "abcDEF123"
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", second)
    assert call_ids(run("mistral", "[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}")) == ["abcDEF123"]


@pytest.mark.parametrize("name", ["pythonic", "llama3_json"])
def test_bare_calls_need_no_markup(name: str) -> None:
    text = "[f(a=1), g()]" if name == "pythonic" else '{"name": "f", "parameters": {"a": 1}}'
    tokens = CharacterTokens()
    output = make_parser(name, tokens, frozenset({EOS})).parse(tokens.encode(text))
    assert shown(output.items)[0] == ("call", "f", '{"a": 1}')
    if name == "pythonic":
        cut = make_parser(name, tokens, frozenset({EOS})).parse(tokens.encode(text[:6]))
        assert shown(cut.items) == [("text", text[:6])]
        assert cut.unparsed_calls == 1
        marked = CharacterTokens(MARKS[name])
        output = make_parser(name, marked, frozenset({EOS})).parse(marked.encode(text))
        assert shown(output.items) == [("text", text)]


def test_schemas_of_any_shape_are_survived() -> None:
    text = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    tokens = CharacterTokens()
    parser = make_parser("qwen3_coder", tokens, frozenset())
    shapes: list[Any] = [
        {},
        {"properties": 1},
        {"properties": {"a": 1}},
        {"properties": {"a": {"anyOf": 3, "type": [1], "enum": 4}}},
        {"properties": {"a": {"$ref": "#"}}},
        {"properties": {"a": {"$ref": "elsewhere.json"}}},
        {"properties": {"a": {"const": 1}}},
    ]
    for shape in shapes:
        tools = [FunctionTool(name="f", parameters=shape)]
        assert shown(parser.parse(tokens.encode(text), tools=tools).items) == [("call", "f", '{"a": 1}')]


def test_every_parser_is_made_by_its_name() -> None:
    assert set(PARSERS) == set(MARKS)
    with pytest.raises(ConfigurationError, match=re.escape(", ".join(PARSERS))):
        make_parser("bogus", CharacterTokens(), frozenset())


def test_arguments_are_json() -> None:
    for name, text, _ in CASES:
        for item in run(name, short(text)).items:
            if isinstance(item, FunctionCall):
                assert isinstance(json.loads(item.arguments), dict)
