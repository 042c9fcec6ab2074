"""Tokenizers with a format's markup, trained in place."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["byte_fallback_tokenizer", "byte_level_tokenizer", "metaspace_tokenizer"]

_SENTENCES = [
    "The answer is 5, because two and three are five.",
    '{"name": "add", "arguments": {"a": 1, "b": 2}}',
    "Größe, naïve, 東京, 🙂 and [f(a=1, b='x')] in one line",
    "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>",
]


def byte_level_tokenizer(
    marks: Sequence[str] = (), *, template: str | None = None, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, as most families have it; `marks` and `eos` become tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, pre_tokenizers.ByteLevel.alphabet(), marks, template, eos)


def metaspace_tokenizer(marks: Sequence[str] = (), *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Train a BPE that writes spaces as `▁`, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer, list(string.ascii_letters), marks, None, eos)


def byte_fallback_tokenizer(marks: Sequence[str] = (), *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Make a tokenizer as Llama 2 has it: spaces are `▁`, and characters that it lacks are single bytes."""
    state = json.loads(metaspace_tokenizer().backend_tokenizer.to_str())
    model, vocabulary = state["model"], state["model"]["vocab"]
    state["added_tokens"] = []
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    model["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_marks(tokenizer, marks, None, eos)


def _finish(
    tokenizer: Tokenizer, alphabet: list[str], marks: Sequence[str], template: str | None, eos: str
) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return _with_marks(tokenizer, marks, template, eos)


def _with_marks(
    tokenizer: Tokenizer, marks: Sequence[str], template: str | None, eos: str
) -> PreTrainedTokenizerFast:
    names = dict.fromkeys([eos, "<|im_start|>", *marks])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)
