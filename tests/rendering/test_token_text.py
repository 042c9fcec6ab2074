"""What tokens spell, against the tokenizers' own decoders, and where texts stand in generations."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.characters import CharacterTokens
from support.generations import CASES, short
from support.parsed import shown
from support.parsers import TOOLS, setting
from support.trained import byte_fallback_tokenizer, byte_level_tokenizer, metaspace_tokenizer

from backends.rendering.token_text import TokenText
from backends.tiny.tokenizer import build_tokenizer

ADDED = ("<｜tool▁call▁begin｜>", "<think>", "</think>", "a b")  # noqa: RUF001 - DeepSeek's bars


@cache
def tokenizer(kind: str) -> Any:
    if kind == "tiny":
        return build_tokenizer(1024)
    if kind == "byte-level":
        return byte_level_tokenizer(ADDED)
    return {"metaspace": metaspace_tokenizer, "fallback": byte_fallback_tokenizer}[kind](
        ["<think>", "</think>"]
    )


def spelled(kind: str, ids: list[int]) -> bytes:
    token_text = TokenText(tokenizer(kind))
    return b"".join(map(token_text.bytes_of, ids))


@pytest.mark.parametrize("kind", ["tiny", "byte-level"])
@settings(deadline=None)
@given(data=st.data())
def test_bytes_of_any_ids(kind: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer(kind)) - 1), max_size=30))
    assert spelled(kind, ids).decode("utf-8", "replace") == tokenizer(kind).decode(ids)


@pytest.mark.parametrize("kind", ["tiny", "byte-level", "fallback", "metaspace"])
@settings(deadline=None)
@given(data=st.data())
def test_bytes_of_any_text(kind: str, data: st.DataObject) -> None:
    # Without bytes to fall back to, a vocabulary lacks characters; and `▁` is how names write a space.
    letters = st.sampled_from("abcXYZ ") if kind == "metaspace" else st.characters(codec="utf-8")
    pieces = st.one_of(
        letters.filter(lambda letter: letter != "▁"), st.sampled_from(["<think>", "the answer", "  "])
    )
    text = "".join(data.draw(st.lists(pieces, max_size=40)))
    assert spelled(kind, tokenizer(kind).encode(text, add_special_tokens=False)) == text.encode()


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer("byte-level").encode(text, add_special_tokens=False)
    return ids


def test_single_tokens() -> None:
    token_text = TokenText(tokenizer("byte-level"))
    first = encode("🙂")[0]
    assert token_text.text_of(first) == "\ufffd"
    assert token_text.bytes_of(len(tokenizer("byte-level")) + 7) == b""
    plain = CharacterTokens(["<think>"])
    assert TokenText(plain).bytes_of(ord("é")) == "é".encode()
    assert TokenText(plain).text_of(plain.special["<think>"]) == "<think>"


PLAIN = st.lists(st.text("ab é🙂\n", min_size=1, max_size=12), max_size=4)


@settings(deadline=None)
@given(texts=PLAIN, data=st.data())
def test_texts_between_marks(texts: list[str], data: st.DataObject) -> None:
    token_text = TokenText(tokenizer("byte-level"))
    ids, expected = [], []
    for text in texts:
        ids += encode(data.draw(st.sampled_from(["<think>", "</think>", "<think></think>"])))
        start = len(ids)
        ids += encode(text)
        expected.append((start, len(ids)))
    ids += encode(data.draw(st.sampled_from(["", "<|im_end|>"])))
    assert token_text.locate(ids, texts) == expected


@settings(deadline=None)
@given(
    texts=PLAIN,
    gaps=st.lists(st.sampled_from(["<think>", "</think>\n\n", "zz", "", "a"]), min_size=5, max_size=5),
)
def test_texts_next_to_others(texts: list[str], gaps: list[str]) -> None:
    """Where a text is said to stand, the tokens spell it and none of them is left over."""
    token_text = TokenText(tokenizer("byte-level"))
    ids = encode(gaps[0] + "".join(text + gap for text, gap in zip(texts, gaps[1:], strict=False)))
    found = token_text.locate(ids, texts)
    for text, place in zip(texts, found, strict=True):
        if place is not None:
            start, end = place
            data, said = spelled("byte-level", ids[start:end]), text.encode()
            assert 0 <= data.find(said) < len(token_text.bytes_of(ids[start]))
            assert len(data) - len(token_text.bytes_of(ids[end - 1])) < data.rfind(said) + len(said)
    places = [place for place in found if place is not None]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("name", "text", "texts", "expected"),
    [
        ("none", "<think>hm</think>yes", ["hm", "yes"], ["hm", "yes"]),
        ("none", "5</think>5", ["5", "5"], ["5", "5"]),
        ("none", "so", ["so", "so"], [None, None]),  # it is one of them, and nobody knows which
        ("none", "so", ["", "no"], [None, None]),
        # The header says the same, but not alone between two marks.
        ("gpt_oss", "<|channel|>final<|message|>f", ["f"], ["f"]),
        ("gpt_oss", "<|channel|>final<|message|>final", ["final"], [None]),
        # A text that goes on, before what is held back.
        ("gpt_oss", "<|channel|>final<|message|>in<", ["in"], ["in"]),
        ("hermes", 'f<tool_call>{"name": "f"}</tool_call>', ["f", '{"x": 1}'], ["f", None]),
    ],
)
def test_where_texts_stand(name: str, text: str, texts: list[str], expected: list[str | None]) -> None:
    at = setting(name, "special")
    ids = at.encode(text)
    found = TokenText(at.tokenizer).locate(ids, texts)
    assert [None if place is None else at.decode(ids[slice(*place)]) for place in found] == expected


def test_a_broken_character_is_located() -> None:
    """A generation may be cut within a character, whose token then still belongs to the text."""
    at = setting("none", "special")
    ids = [*at.encode("<think>a"), *at.encode("丂")[:2]]
    token_text = TokenText(at.tokenizer)
    assert token_text.locate(ids, ["a\ufffd"]) == [(1, 4)]
    assert token_text.locate([*ids, *at.encode("</think>b")], ["a\ufffd", "b"]) == [(1, 4), (5, 6)]


def test_a_token_may_belong_to_two_texts() -> None:
    token_text = TokenText(tokenizer("byte-level"))
    token = next(
        number for number in range(len(tokenizer("byte-level"))) if token_text.text_of(number) == "an"
    )
    assert token_text.locate([*encode("<think>"), token], ["a", "n"]) == [(1, 2), (1, 2)]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_what_parsers_read_is_located(name: str, text: str, expected: list[tuple[str, ...]]) -> None:
    at = setting(name, "special")
    ids = at.encode(short(text))
    rows = shown(at.parser.parse(ids, prompt=[at.eos], tools=TOOLS).items)
    found = TokenText(at.tokenizer).locate(ids, [row[-1] for row in rows])
    for (kind, *_, said), place in zip(rows, found, strict=True):
        if kind != "call" and said:
            assert place is not None
            assert at.decode(ids[slice(*place)]) == said
