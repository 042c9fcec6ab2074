"""Grammars are read by any tokenizer that llguidance knows, and no text of theirs is a special token."""

from __future__ import annotations

import string

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backends.grammars import Grammars
from backends.transformers.masks import Masks
from gym_sdk.errors import PolicyError

END = 2
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LETTERS = ["▁", *string.ascii_lowercase, *string.digits, *'{}":,<>/', "yes"]
PIECES = [*SPECIAL, *BYTES, *LETTERS]


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: its special tokens stand in the vocabulary of the model."""
    if kind == "unigram":
        scores = [(piece, -10.0 if piece in BYTES else -3.0) for piece in PIECES]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        ids = {piece: number for number, piece in enumerate(PIECES)}
        tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("  ", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ["yes", "<s>", "</s>", "<tool>", "a  <tool> é"])
def test_forced_text_is_spelled_without_special_tokens(kind: str, text: str) -> None:
    tokenizer = sentencepiece(kind)
    grammars = Grammars(tokenizer, len(tokenizer))
    masks = Masks(grammars, len(tokenizer))
    matcher = grammars.compile(f'start: "{text}" <[{END}]>')
    ids: list[int] = []
    while not matcher.is_stopped():
        allowed = masks.allowed([matcher], torch.device("cpu"))[0].nonzero()[:, 0].tolist()
        assert allowed
        ids.append(allowed[-1])
        assert matcher.consume_token(ids[-1])
    assert ids[-1] == END
    assert tokenizer.decode(ids[:-1]) == text
    assert not {*range(len(SPECIAL)), tokenizer.convert_tokens_to_ids("<tool>")} & set(ids[:-1])
    assert not masks.allowed([matcher], torch.device("cpu")).any()


def test_a_tokenizer_that_is_not_readable_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(PolicyError, match="tokenizer") as caught:
        Grammars(tokenizer, 2).compile("start: <[1]>")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "grammar")
