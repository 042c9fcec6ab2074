from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from backends.tiny import RECIPES
from backends.tiny.tokenizer import build_tokenizer
from backends.tiny.vocabulary import IM_END, MARKUP_TOKENS, SPECIAL_TOKENS

TOKENIZER = build_tokenizer(2048)


TOKENIZERS = {name: build_tokenizer(2048, recipe.mix.vocabulary) for name, recipe in RECIPES.items()}


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_unicode_text_survives(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading and trailing  ",
        "tabs\tand\r\nnewlines\n\n\n",
        "it 's , don 't . cleaned ?",
        "Ünïcödé, 日本語, עברית, 🏳️‍🌈 and \u0301 alone",
        "\x00\x1f\x7f\u2028\ufeff\U0010ffff",
        "<|im_end|> typed by a user <tool_call>",
        "-1 --2 -(-3) ٣ ½ -½",
    ],
)
def test_awkward_text_survives(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_and_markup_tokens_are_single() -> None:
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        assert len(TOKENIZER.encode(token)) == 1, token
    assert TOKENIZER.eos_token == IM_END
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


def test_markup_survives_decoding_without_special_tokens() -> None:
    token_ids = TOKENIZER.encode("<tool_call>\n{}\n</tool_call><|im_end|>")
    assert TOKENIZER.decode(token_ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"


def test_a_number_has_the_same_tokens_wherever_it_stands() -> None:
    number = TOKENIZER.encode("-12")
    assert len(number) == 3
    for before, after in [
        ('{"expression": "', '"}}'),
        ("The answer is ", "."),
        ("\n", "\n"),
        ("5 + ", " * 3"),
        ("( ", " )"),
        ("", " ="),
    ]:
        token_ids = TOKENIZER.encode(f"{before}-12{after}")
        start = len(TOKENIZER.encode(before))
        assert token_ids[start : start + 3] == number, (before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Follow the lockers from ", "."),
        ('{"name": "open", "arguments": {"locker": "', '"}}'),
        ("1, next ", "\n"),
    ],
)
def test_a_locker_is_one_token_wherever_it_stands(before: str, after: str) -> None:
    tokenizer = TOKENIZERS["lockers"]
    for name in "abcdefghijklmnopqrstuvwxyz":
        (token_id,) = tokenizer.encode(name)
        token_ids = tokenizer.encode(f"{before}{name}{after}")
        assert token_ids == [*tokenizer.encode(before), token_id, *tokenizer.encode(after)]


def test_the_frame_of_opening_a_locker_is_one_token() -> None:
    assert len(TOKENIZERS["lockers"].encode('{"name": "open", "arguments": {"locker": "')) == 1


@pytest.mark.parametrize("word", ["hello", "Word", "this", "example", "user", "assistant", "Spell"])
def test_a_word_is_spelled_letter_by_letter(word: str) -> None:
    tokenizer = TOKENIZERS["spelling"]
    question = "Spell this word backward (example: sun -> nus): "
    letters = [token_id for letter in word for token_id in tokenizer.encode(letter)]
    assert len(letters) == len(word)
    assert tokenizer.encode(question + word) == tokenizer.encode(question) + letters
    assert tokenizer.encode(word) == letters
    assert len(tokenizer.encode(question)) < 20


def test_it_is_small_and_the_same_each_time() -> None:
    assert 340 <= len(TOKENIZER) <= 420
    again = build_tokenizer(2048)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    text = "State the final answer to the following arithmetic problem: 12 + 5 - 30 ="
    assert again.encode(text) == TOKENIZER.encode(text)


def test_transformers_reloads_it(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.model_max_length == 2048
    text = " it 's ünïcode -12 <tool_call>\n"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
