"""Parsers on any ids of a real tokenizer: they never raise, lose nothing, and repeat themselves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.markup import MARKS, THINK
from support.parsed import shown
from support.parsers import TOOLS, setting
from support.trained import metaspace_tokenizer

from backends.rendering.parsing import PARSERS, make_parser

ADDRESSED = ("gpt_oss", "atem")
"""Formats of messages: the markup around their texts is dropped."""


def bare(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("kind", ["special", "spelled"])
@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None)
@given(data=st.data())
def test_any_ids(name: str, kind: str, data: st.DataObject) -> None:
    at = setting(name, kind)
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


@settings(deadline=None)
@given(data=st.data())
def test_text_is_what_the_ids_say(data: st.DataObject) -> None:
    at = setting("none", "special")
    think = {at.tokenizer.convert_tokens_to_ids(mark) for mark in THINK}
    ids = [number for number in data.draw(at.ids) if number not in {at.eos, *think}]
    output = at.parser.parse(ids)
    assert shown(output.items) == [("text", at.decode(ids))]


@pytest.mark.parametrize("name", PARSERS)
def test_a_long_prompt_costs_nothing(name: str) -> None:
    at = setting(name, "special")

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
