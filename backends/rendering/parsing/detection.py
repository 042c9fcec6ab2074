"""Which parser a tokenizer's model needs."""

# ruff: noqa: RUF001 - DeepSeek spells its tokens with full-width bars

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.rendering.parsing.pieces import token_id

__all__ = ["detect_parser"]

_BY_TEMPLATE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("gpt_oss", ("<|start|>", "<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>call:",)),
    ("atem", ("<|start|>", "<|message|>", "<atem:function_calls>")),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("hermes", ("<tool_call>", '"name"')),
    ("hermes", ("<tool_call>", "'name'")),
    ("hermes", ("<tool_call>", '\\"name\\"')),
    ("llama3_json", ("ipython", '"parameters":')),
    ("llama3_json", ("<|python_tag|>",)),
)
"""What a template has to say, the most telling first: XML formats stand within Hermes' marks."""

_BY_VOCABULARY: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("gpt_oss", ("<|start|>", "<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>", "<tool_call|>", '<|"|>')),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
)
"""What a vocabulary has to hold if the template is silent but takes tools."""


def detect_parser(tokenizer: Any) -> str:
    """Return the name of the parser that fits a tokenizer's chat template, or `none`.

    Args:
        tokenizer: with `chat_template` (a text, or texts by name) and a vocabulary.
    """
    template = _template(tokenizer)
    for name, words in _BY_TEMPLATE:
        if all(word in template for word in words):
            return name
    if "tools" in template:
        for name, tokens in _BY_VOCABULARY:
            if all(token_id(tokenizer, token) is not None for token in tokens):
                return name
    return "none"


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        # Families with several templates call the one that takes tools so.
        template = template.get("tool_use") or template.get("default")
    return template if isinstance(template, str) else ""
