"""Generated ids into items: nothing sampled is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.rendering import HermesParser
from gym_sdk.schema import FunctionCall, Item, Message, Reasoning

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EOS = 1_000_000


class CharacterTokens:
    """A tokenizer with one id for each character, and ids of their own for the markup if `special`."""

    def __init__(self, *, special: bool) -> None:
        self.special = {mark: 2_000_000 + n for n, mark in enumerate(MARKS)} if special else {}

    def encode(self, text: str) -> list[int]:
        if not self.special:
            return [ord(character) for character in text]
        pieces = re.split("(" + "|".join(MARKS) + ")", text)
        ids: list[int] = []
        for piece in pieces:
            ids += [self.special[piece]] if piece in self.special else [ord(c) for c in piece]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        names = {number: mark for mark, number in self.special.items()}
        return "".join(names.get(token) or chr(token) for token in token_ids)

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        return self.special.get(tokens)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])


@pytest.fixture(params=[True, False], ids=["special tokens", "spelled out"])
def tokens(request: pytest.FixtureRequest) -> CharacterTokens:
    return CharacterTokens(special=request.param)


def parse(tokens: CharacterTokens, text: str, *, stop: bool = True) -> list[Item]:
    parser = HermesParser(tokens, frozenset({EOS}))
    return parser.parse(tokens.encode(text) + [EOS] * stop).items


def shown(items: list[Item]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for item in items:
        if isinstance(item, FunctionCall):
            rows.append(("call", item.name, item.arguments))
        elif isinstance(item, Reasoning):
            rows.append(("think", item.text))
        else:
            assert isinstance(item, Message)
            rows.append(("text", item.text))
    return rows


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
        "</tool_call> only closed",
    ],
)
def test_what_does_not_parse_stays_text(tokens: CharacterTokens, text: str) -> None:
    parser = HermesParser(tokens, frozenset({EOS}))
    output = parser.parse(tokens.encode(text))
    assert shown(output.items) == [("text", text)]
    assert output.unparsed_calls == ("<tool_call>" in text)


def test_markup_spelled_out_is_text_where_the_tokenizer_has_the_tokens() -> None:
    tokens = CharacterTokens(special=True)
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = HermesParser(tokens, frozenset({EOS}))
    items = parser.parse([ord(character) for character in text]).items
    assert shown(items) == [("text", text)]


def test_reasoning_tokens_are_counted() -> None:
    tokens = CharacterTokens(special=True)
    parser = HermesParser(tokens, frozenset({EOS}))
    assert parser.parse(tokens.encode("<think>abc</think>d")).reasoning_tokens == 5
    assert parser.parse(tokens.encode("<think>cut")).reasoning_tokens == 4


pieces = st.lists(
    st.sampled_from([*MARKS, '{"name": "f", "arguments": {"x": 1}}']) | st.text(max_size=5), max_size=8
)


@given(pieces, st.booleans(), st.booleans())
def test_no_character_is_lost(texts: list[str], special: bool, stop: bool) -> None:
    """Everything but markup and blank text comes back, in order."""
    tokens = CharacterTokens(special=special)
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
