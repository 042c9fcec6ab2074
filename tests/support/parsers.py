"""Parsers over real tokenizers, and generations for them as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, Literal

from hypothesis import strategies as st

from backends.rendering.parsing import Parser, make_parser
from gym_sdk.schema import FunctionTool
from support.markup import MARKS, THINK
from support.trained import byte_fallback_tokenizer, byte_level_tokenizer

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
TOOLS = [FunctionTool(name="f", parameters={"properties": {"a": {"type": "string"}}})]


Kind = Literal["special", "spelled", "bytes"]
"""How markup is written: as tokens of its own, or spelled out; by bytes or with a fallback to bytes."""


class Setting:
    """A parser, its tokenizer, and what to draw ids from."""

    def __init__(self, name: str, kind: Kind) -> None:
        marks = (*MARKS[name], *THINK)
        make = byte_fallback_tokenizer if kind == "bytes" else byte_level_tokenizer
        self.tokenizer: Any = make(() if kind == "spelled" else marks)
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
def setting(name: str, kind: Kind) -> Setting:
    return Setting(name, kind)
