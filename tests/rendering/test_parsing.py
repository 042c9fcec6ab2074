"""Generated ids into items: nothing sampled is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.characters import EOS, CharacterTokens
from support.parsed import shown

from backends.rendering import HermesParser
from gym_sdk.schema import FunctionCall, Item, Message, Reasoning

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture(params=[True, False], ids=["special tokens", "spelled out"])
def tokens(request: pytest.FixtureRequest) -> CharacterTokens:
    return CharacterTokens(MARKS if request.param else ())


def parse(tokens: CharacterTokens, text: str, *, stop: bool = True) -> list[Item]:
    parser = HermesParser(tokens, frozenset({EOS}))
    return parser.parse(tokens.encode(text) + [EOS] * stop).items


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 5.", [("text", "The answer is 5.")]),
        ("", [("text", "")]),
        (
            '<tool_call>\n{"name": "add", "arguments": {"a":1,  "b": 2}}\n</tool_call>',
            [("call", "add", '{"a":1,  "b": 2}')],
        ),
        (
            'a <tool_call>{"name": "f"}</tool_call> b '
            '<tool_call>{"name": "g", "arguments": "{oops"}</tool_call>',
            [("text", "a "), ("call", "f", "{}"), ("text", " b "), ("call", "g", "{oops")],
        ),
        ("<think>\nhm\n</think>\n\nyes", [("think", "\nhm\n"), ("text", "\n\nyes")]),
        ("hm</think>yes", [("think", "hm"), ("text", "yes")]),
        (
            '<think>x</think>\n<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            [("think", "x"), ("call", "f", "[1]")],
        ),
        (
            '<tool_call>{"arguments": {"name": "f"}, "name": "g"}</tool_call>',
            [("call", "g", '{"name": "f"}')],
        ),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [("call", "f", "null")]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": {"arguments": {"b": "}"}}, "é": "東"}}</tool_call>',
            [("call", "f", '{"a": {"arguments": {"b": "}"}}, "é": "東"}')],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 1.0, "a": true}}</tool_call>',
            [("call", "f", '{"a": 1.0, "a": true}')],
        ),
    ],
)
def test_markup(tokens: CharacterTokens, text: str, expected: list[tuple[str, ...]]) -> None:
    assert shown(parse(tokens, text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{not json</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        'so: <tool_call>{"name": "f"',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": ' + "[" * 100_000 + "</tool_call>",
        '<tool_call>{"name": "f", "arguments": ' + "1" * 5_000 + "}</tool_call>",
        "</tool_call> only closed",
    ],
)
def test_what_does_not_parse_stays_text(tokens: CharacterTokens, text: str) -> None:
    parser = HermesParser(tokens, frozenset({EOS}))
    output = parser.parse(tokens.encode(text))
    assert shown(output.items) == [("text", text)]
    assert output.unparsed_calls == ("<tool_call>" in text)


def test_blank_text_alone_is_the_message(tokens: CharacterTokens) -> None:
    assert shown(parse(tokens, " \n")) == [("text", " \n")]


def test_markup_spelled_out_is_text_where_the_tokenizer_has_the_tokens() -> None:
    tokens = CharacterTokens(MARKS)
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = HermesParser(tokens, frozenset({EOS}))
    items = parser.parse([ord(character) for character in text]).items
    assert shown(items) == [("text", text)]


def test_reasoning_tokens_are_counted() -> None:
    tokens = CharacterTokens(MARKS)
    parser = HermesParser(tokens, frozenset({EOS}))
    assert parser.parse(tokens.encode("<think>abc</think>d")).reasoning_tokens == 5
    assert parser.parse(tokens.encode("<think>cut")).reasoning_tokens == 4


pieces = st.lists(
    st.sampled_from([*MARKS, '{"name": "f", "arguments": {"x": 1}}']) | st.text(max_size=5), max_size=8
)


@given(pieces, st.booleans(), st.booleans())
def test_no_character_is_lost(texts: list[str], special: bool, stop: bool) -> None:
    """Everything but markup and blank text comes back, in order."""
    tokens = CharacterTokens(MARKS if special else ())
    text = "".join(texts)
    items = parse(tokens, text, stop=stop)
    assert items

    def content(item: Item) -> str:
        if isinstance(item, FunctionCall):
            return json.dumps({"name": item.name, "arguments": json.loads(item.arguments)})
        assert isinstance(item, Message | Reasoning)
        return item.text

    def bare(value: str) -> str:
        for mark in MARKS:
            value = value.replace(mark, "")
        return "".join(value.split())

    if special or not any(mark in bare(text) for mark in MARKS):
        assert bare("".join(content(item) for item in items)) == bare(text)
