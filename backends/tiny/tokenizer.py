"""A byte-level BPE tokenizer made from a few lines of text."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from backends.tiny.vocabulary import (
    ARITHMETIC,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    MARKUP_TOKENS,
    SPECIAL_TOKENS,
    Vocabulary,
)

__all__ = ["build_tokenizer"]


def build_tokenizer(model_max_length: int, vocabulary: Vocabulary = ARITHMETIC) -> PreTrainedTokenizerFast:
    """Build the tokenizer, with its chat template.

    It encodes any Unicode text without loss: nothing is normalized, and every byte has a token.

    Args:
        model_max_length: the policy's context length, in tokens.
        vocabulary: where text is split, and what is learned from.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(vocabulary.pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    # Twice, since the trainer is told to drop pairs that it saw only once.
    tokenizer.train_from_iterator(vocabulary.texts * 2, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
