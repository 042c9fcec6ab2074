"""What the tokenizer and the chat template are made of. Plain constants: importing this is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ARITHMETIC",
    "CHAT_TEMPLATE",
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "MARKUP_TOKENS",
    "SPECIAL_TOKENS",
    "Vocabulary",
]

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Left out of decoded text with `skip_special_tokens`."""

MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Single tokens that stay in decoded text, as in Qwen3: parsers look for them there."""

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the merges of a tokenizer are learned from.

    Attributes:
        pieces: a regular expression of the pieces into which text is split before merging; together they
            match any text. No token ever spans two pieces.
        texts: what merges are learned from.
    """

    pieces: str
    texts: tuple[str, ...]


_SIGN = r"-(?=[\p{N}(])"

ARITHMETIC = Vocabulary(
    # Digits one by one, a binary operator with its spaces, and a sign apart from what stands before it. A
    # number then has the same tokens wherever it stands, so that copying it is copying tokens.
    pieces="|".join(
        (
            r"\p{N}",
            r" [-+*/] ",
            r"[()]",
            _SIGN,
            rf" ?(?:(?!{_SIGN})[^\s\p{{L}}\p{{N}}()])+",
            r" ?\p{L}+",
            r"\n",
            r"\s+",
        )
    ),
    # Nothing here has a sign, so that "-" stays a token of its own.
    texts=(
        "system\ntools: calculator(expression)",
        "user\nState the final answer to the following arithmetic problem: 1 + 2 - 3 =",
        "user\nCalculate ( 1 + 2 ) * 3 - 4 / 5.",
        'assistant\n{"name": "calculator", "arguments": {"expression": "1 + 2 * 3"}}\n',
        "assistant\nThe answer is 6.",
        "What is the error? Error: the tool failed, try again. Let me think: yes, no, done.",
    ),
)
"""The default: of the policy that learns to use a calculator."""
