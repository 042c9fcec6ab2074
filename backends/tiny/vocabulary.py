"""What the tokenizer and the chat template are made of. Plain constants: importing this is cheap."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CHAT_TEMPLATE",
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "MARKUP_TOKENS",
    "PIECES",
    "SPECIAL_TOKENS",
    "TEXTS",
]

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Left out of decoded text with `skip_special_tokens`."""

MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Single tokens that stay in decoded text, as in Qwen3: parsers look for them there."""

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")

_SIGN = r"-(?=[\p{N}(])"

PIECES = "|".join(
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
)
"""Where text is split before merging: digits one by one, a binary operator with its spaces, and a sign apart
from what stands before it. A number then has the same tokens wherever it stands, so that copying it is
copying tokens."""

TEXTS = (
    "system\ntools: calculator(expression)",
    "user\nState the final answer to the following arithmetic problem: 1 + 2 - 3 =",
    "user\nCalculate ( 1 + 2 ) * 3 - 4 / 5.",
    'assistant\n{"name": "calculator", "arguments": {"expression": "1 + 2 * 3"}}\n',
    "assistant\nThe answer is 6.",
    "What is the error? Error: the tool failed, try again. Let me think: yes, no, done.",
)
"""What merges are learned from. Nothing here has a sign, so that "-" stays a token of its own."""
