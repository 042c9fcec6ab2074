"""Parsers on any ids of a real tokenizer: they never raise, lose nothing, and repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.markup import MARKS, THINK
from support.parsed import shown
from support.trained import byte_level_tokenizer, metaspace_tokenizer

from backends.rendering.parsing import PARSERS, Parser, make_parser
from gym_sdk.schema import FunctionTool

WORDS = (
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "f", "parameters": {"a": null}}; ',
    "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
    "[f(a=1)]",
    '[{"name": "f", "arguments": {}, "id": "abcdefgh1"}]',
    "functions.f:0",
    "assistant",
    "analysis",
    "commentary to=functions.f ",
    "final",
    "f",
    '{"a": "\\ud800"}',
    "[" * 2_000,
    "\n```json\n{}\n```",
    "call:f{a:1,b:",
    '},"c":[true,None]}',
    "thought\n",
    " to=f",
    "assistant to=self",
    '<atem:function_calls>\n<atem:invoke name="f">\n<atem:parameter name="a">1</atem:parameter>\n',
    "</atem:invoke>\n</atem:function_calls>",
    '<invoke name="f"><parameter name="a">',
    "</parameter></invoke>",
    " ",
)
ADDRESSED = ("gpt_oss", "atem")
"""Formats of messages: the markup around their texts is dropped."""
TOOLS = [FunctionTool(name="f", parameters={"properties": {"a": {"type": "string"}}})]


class Setting:
    """A parser, its tokenizer, and what to draw ids from."""

    def __init__(self, name: str, special: bool) -> None:
        marks = (*MARKS[name], *THINK)
        self.tokenizer: Any = byte_level_tokenizer(marks if special else ())
        self.eos: int = self.tokenizer.eos_token_id
        self.parser: Parser = make_parser(name, self.tokenizer, frozenset({self.eos}))
        self.marks = [self.encode(mark) for mark in marks]
        self.words = [self.encode(word) for word in WORDS]
        numbers = st.integers(0, len(self.tokenizer) - 1).map(lambda number: [number])
        chunks = st.one_of(numbers, st.sampled_from(self.marks), st.sampled_from(self.words))
        self.ids = st.lists(chunks, max_size=14).map(lambda parts: list(chain.from_iterable(parts)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


@cache
def setting(name: str, special: bool) -> Setting:
    return Setting(name, special)


def bare(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "spelled out"])
@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_any_ids(name: str, special: bool, data: st.DataObject) -> None:
    at = setting(name, special)
    ids, prompt = data.draw(at.ids), data.draw(at.ids)
    first = at.parser.parse(ids, prompt=prompt, tools=TOOLS)
    second = at.parser.parse(list(ids), prompt=list(prompt), tools=TOOLS)
    assert first.items
    assert shown(first.items) == shown(second.items)
    assert (first.reasoning_tokens, first.unparsed_calls) == (second.reasoning_tokens, second.unparsed_calls)
    assert 0 <= first.reasoning_tokens <= len(ids) + len(MARKS[name])
    for item in first.items:
        item.to_wire_json()
    # Items come in the order of sampling, and their text stands in what was sampled.
    text, place = at.decode(ids[:-1] if ids and ids[-1] == at.eos else ids), 0
    for kind, *content in shown(first.items):
        if kind != "call":
            place = _find(text, content[0], place)
    if not any(kind in ("call", "think") for kind, *_ in shown(first.items)) and name not in ADDRESSED:
        assert bare("".join(content[0] for _, *content in shown(first.items))) == bare(text)


def _find(text: str, piece: str, place: int) -> int:
    """Return where a message ends in the sampled text; markup of sections may have been dropped within it."""
    index = text.find(piece, place)
    if index >= 0:
        return index + len(piece)
    for word in piece.split():
        place = text.index(word, place) + len(word)
    return place


@given(data=st.data())
def test_text_is_what_the_ids_say(data: st.DataObject) -> None:
    at = setting("none", True)
    think = {at.tokenizer.convert_tokens_to_ids(mark) for mark in THINK}
    ids = [number for number in data.draw(at.ids) if number not in {at.eos, *think}]
    output = at.parser.parse(ids)
    assert shown(output.items) == [("text", at.decode(ids))]


@pytest.mark.parametrize("name", PARSERS)
def test_a_long_prompt_costs_nothing(name: str) -> None:
    at = setting(name, True)

    class Prompt(list[int]):
        reads = 0

        def __getitem__(self, key: Any) -> Any:
            Prompt.reads += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
            return super().__getitem__(key)

        def __iter__(self) -> Any:
            raise AssertionError("the whole prompt is read")

    at.parser.parse(at.encode("hi"), prompt=Prompt(at.encode("word ") * 20_000))
    assert Prompt.reads < 10_000


def test_no_space_is_lost_after_markup() -> None:
    """SentencePiece tokenizers drop the space that begins a text, and a piece is not the beginning."""
    tokenizer: Any = metaspace_tokenizer(THINK)
    ids = tokenizer.encode("<think> so </think> yes", add_special_tokens=False)
    assert tokenizer.decode(ids) == "<think> so </think> yes"
    parser = make_parser("none", tokenizer, frozenset())
    assert shown(parser.parse(ids).items) == [("think", " so "), ("text", " yes")]
