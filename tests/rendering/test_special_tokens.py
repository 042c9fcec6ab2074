"""Special tokens in text: where they are found, whose text they are, and how look-alikes are tokenized."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trained import byte_level_tokenizer, metaspace_tokenizer
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backends.rendering.attribution import Header, Marks, Span, owners_of
from backends.rendering.encoding import Encoder
from backends.rendering.special import SpecialTokens

MARKS = ["<a>", "<a>>", "</s>", "a>"]
BYTES = byte_level_tokenizer(MARKS)
SPACES = metaspace_tokenizer(MARKS)
PIECES = st.lists(st.sampled_from([*MARKS, "<", "<a", "x y", "\n", " ", "é"]), max_size=8).map("".join)


def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """Begin every piece with a space, as SentencePiece tokenizers of the Llama 2 age do."""
    tokenizer = metaspace_tokenizer(MARKS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return tokenizer


@given(PIECES)
def test_pieces_join_to_the_text_and_special_tokens_stand_alone(text: str) -> None:
    special = SpecialTokens(BYTES)
    pieces = special.split(text)
    assert "".join(pieces) == text
    assert all(piece in special or not special.occur_in(piece) for piece in pieces)
    assert [text[a:b] for a, b in special.spans(text)] == [piece for piece in pieces if piece in special]
    assert [BYTES.convert_tokens_to_ids(piece) for piece in pieces if piece in special] == [
        token for token in BYTES.encode(text) if token in BYTES.added_tokens_decoder
    ]


def test_the_longest_of_several_special_tokens_counts() -> None:
    assert SpecialTokens(BYTES).split("a<a>>b") == ["a", "<a>>", "b"]


def test_a_text_without_special_tokens_is_one_piece() -> None:
    special = SpecialTokens(BYTES)
    assert special.split("plain") == ["plain"]
    assert special.split("") == []
    assert special.next("plain") is None


@pytest.mark.parametrize(
    "tokenizer", [BYTES, SPACES, prefixing_tokenizer()], ids=["bytes", "spaces", "prefix"]
)
@settings(deadline=None)
@given(text=PIECES)
def test_inside_a_span_nothing_is_a_special_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    encoder = Encoder(tokenizer)
    whole = f"</s>{text}<a>"
    end = len(whole) - len("<a>")
    ids = encoder.encode_spans(whole, [Span(4, end, 0)])
    added = [token for token in ids if token in tokenizer.added_tokens_decoder]
    assert [encoder.decode([token]) for token in added] == ["</s>", "<a>"]
    if tokenizer is BYTES or not {"é", "\n"} & {*text}:  # which not every vocabulary has
        assert encoder.decode(ids).replace(" ", "") == whole.replace(" ", "")


@pytest.mark.parametrize(
    "tokenizer", [BYTES, SPACES, prefixing_tokenizer()], ids=["bytes", "spaces", "prefix"]
)
def test_text_without_look_alikes_is_tokenized_as_the_tokenizer_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "</s>five and two<a> five"
    assert Encoder(tokenizer).encode_spans(text, [Span(4, 16, 0)]) == tokenizer.encode(
        text, add_special_tokens=False
    )


def test_a_tokenizer_that_begins_pieces_with_a_space_adds_none_inside_a_look_alike() -> None:
    encoder = Encoder(prefixing_tokenizer())
    ids = encoder.encode_spans("<a>five</s>two</s>", [Span(3, 14, 0)])
    assert encoder.decode(ids[1:-1]).strip() == "five</s>two"


def test_whitespace_that_a_special_token_swallows_stays_swallowed() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|e|>", rstrip=True, normalized=False)]}
    )
    encoder = Encoder(tokenizer)
    text = "<|e|>\n<|im_end|> x<|e|>"
    ids = encoder.encode_spans(text, [Span(6, 18, 0)])
    assert encoder.decode(ids) == "<|e|><|im_end|> x<|e|>"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 0


@given(st.text(max_size=8), st.text(max_size=8), st.integers(0, 1200))
def test_marks_come_out_as_they_went_in(one: str, other: str, item: int) -> None:
    text, spans = Marks.read(f"a{Marks.wrap(item, one)}b{Marks.wrap(item + 1, other)}c")
    assert text == f"a{one}b{other}c"
    kept = [(item + index, said.strip()) for index, said in enumerate((one, other)) if said.strip()]
    assert [(span.item, text[span.start : span.end]) for span in spans] == kept


def test_nobody_can_write_a_mark() -> None:
    attack = "\ue0001\ue002x\ue001"
    assert Marks.read(attack) == (attack, [])


def test_what_stands_between_two_items_belongs_to_the_first_up_to_its_closing_token() -> None:
    #       0123456789
    text = "Sh[A]e\nh[B]"
    spans = [Span(2, 5, 0), Span(8, 11, 1)]
    single = [(index, index + 1) for index in range(len(text))]
    assert owners_of(spans, [(5, 6)], single, Header()) == [0] * 6 + [1] * 5
    assert owners_of(spans, [(5, 6)], single, Header(1, False)) == [0] * 5 + [1] * 6


def test_owners_of_a_text_with_look_alikes_are_known() -> None:
    encoder = Encoder(BYTES)
    text = "<a>x</s>y</s>"
    spans = [Span(3, 9, 0)]
    ids = encoder.encode_spans(text, spans)
    owners = encoder.owners(text, ids, spans, Header())
    assert len(owners) == len(ids)
    assert encoder.decode([i for i, owner in zip(ids, owners, strict=True) if owner == 0]).endswith(
        "x</s>y</s>"
    )
    assert encoder.owners(text, ids, None, Header()) == [-1] * len(ids)
