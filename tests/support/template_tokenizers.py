"""Tokenizers with the special tokens of real chat templates, and a template in the manner of Mistral's."""

from __future__ import annotations

import re
from functools import cache

from transformers import PreTrainedTokenizerFast

from backends.rendering import TemplateRenderer
from backends.tiny.tokenizer import build_tokenizer
from support.templates import trl_templates
from support.trained import byte_level_tokenizer

__all__ = ["MISTRAL", "renderers", "special_tokens", "template_tokenizer"]

_MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # <|im_start|>
    "|<\uff5c[^\uff5c<>]{1,40}\uff5c>"  # DeepSeek's
    r"|<\|[a-z_\"]{1,30}>|<[a-z_]{1,30}\|>|<\|\"\|>"  # Gemma 4's
    r"|</?(?:think|tool_call|tool_response|arg_key|arg_value|start_of_turn|end_of_turn|s|sop)>"
    r"|<(?:end_of_utterance|image_soft_token)>"
    r"|\[/?[A-Z_]{3,20}\]|\[gMASK\]"  # Mistral's, GLM's
)

_EOS = {"gptoss": "<|return|>", "glm4": "<|endoftext|>", "nemotron": "<|im_end|>", "muse": "<|eot|>"}
"""Where the model's EOS is not the first of `_CLOSINGS` in its template; by the start of the name."""

_CLOSINGS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<\uff5cend▁of▁sentence\uff5c>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<|endoftext|>",
)

MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in turns %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{{- '<s>' }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == ns.last_user %}
            {{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' ~ (system ~ '\\n\\n' if system and loop.index0 == ns.last_user else '') }}
        {{- message.content ~ '[/INST]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not string or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs must have 9 characters') }}
            {%- endif %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
            {{- ']' if loop.last else ', ' }}
        {%- endfor %}
        {{- '</s>' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ '</s>' }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs must have 9 characters') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] ' ~ {'content': message.content, 'call_id': message.tool_call_id} | tojson }}
        {{- '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and tool messages, and one system message in front') }}
    {%- endif %}
{%- endfor %}
"""
"""Tools stand before the last user message, call ids have nine characters, and nothing opens the answer."""


def special_tokens(template: str) -> list[str]:
    """Return the special tokens that a template writes."""
    return sorted(set(_MARK.findall(template)))


def template_tokenizer(name: str, template: str) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer for a template; the name tells which EOS the family has."""
    marks = special_tokens(template)
    eos = next((eos for family, eos in _EOS.items() if name.startswith(family)), None)
    eos = eos or next((token for token in _CLOSINGS if token in marks), "</s>")
    tokenizer = byte_level_tokenizer([*marks, "<bos>"], template=template, eos=eos)
    tokenizer.bos_token = "<bos>"
    return tokenizer


@cache
def renderers() -> dict[str, TemplateRenderer]:
    """Return a renderer for each template: TRL's, the tiny policy's, and one in the manner of Mistral's."""
    templates = {**trl_templates(), "mistral": MISTRAL}
    made = {name: TemplateRenderer(template_tokenizer(name, source)) for name, source in templates.items()}
    return {**made, "tiny": TemplateRenderer(build_tokenizer(1024))}
