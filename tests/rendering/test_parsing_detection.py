"""Which parser is found for real templates, and what it makes of the calls that they render."""

# ruff: noqa: RUF001 - DeepSeek spells its tokens with full-width bars
from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.markup import MARKS, THINK
from support.parsed import shown
from support.template_tokenizers import renderers
from support.templates import trl_templates
from support.trained import byte_level_tokenizer

from backends.rendering.parsing import detect_parser, make_parser
from gym_sdk.schema import FunctionCall, FunctionTool

DETECTED = {
    "atem": ("muse_glimmer",),
    "deepseek_v3": ("deepseek_r1_distill", "deepseekv3"),
    "gemma4": ("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
    "glm45": ("glm4moe",),
    "gpt_oss": ("gptoss",),
    "hermes": ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"),
    "llama3_json": ("llama3_1", "llama3_2"),
    "pythonic": ("lfm2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"),
    "qwen3_coder": (
        "nemotron_3_5_lightning",
        "nemotron_3_nano",
        "nemotron_3_super",
        "nemotron_3_ultra",
        "qwen3_5_nothink",
        "qwen3_5_think",
        "qwen3_6",
        "qwen3_8",
    ),
    # These take no tools.
    "none": (
        "cohere",
        "cohere2",
        "gemma",
        "gemma3",
        "idefics3",
        "llama3",
        "llava_next",
        "phi3",
        "phi3_5",
        "qwen2_5_vl",
        "smolvlm",
    ),
}
EXPECTED = {template: parser for parser, templates in DETECTED.items() for template in templates}
SPECIAL = (
    *chain.from_iterable(MARKS.values()),
    *THINK,
    "<｜Assistant｜>",
    "<｜User｜>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|assistant|>",
    "<|user|>",
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|tool_response>", "<tool_response|>", "<|eom|>"),
)
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "code": {"type": "string"},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
}
ARGUMENTS = {"city": "Zürich «東京»", "code": "12", "days": 3, "tags": ["a", 'b"c']}


@pytest.mark.parametrize("name", sorted(trl_templates()))
def test_real_templates(name: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = trl_templates()[name]
    assert detect_parser(tokenizer) == EXPECTED[name.removesuffix("_training")]


@pytest.mark.parametrize(
    ("template", "marks", "expected"),
    [
        (None, (), "none"),
        ("{{ messages }}", ("[TOOL_CALLS]",), "none"),
        ("{{ tools }}", ("[TOOL_CALLS]",), "mistral"),
        ("{{ tools }}[TOOL_CALLS]", (), "mistral"),
        ("{{ tools }}<|tool_calls_section_begin|>", (), "kimi_k2"),
        ("{{ tools }}<minimax:tool_call>", (), "minimax_m2"),
        ("{{ tools }}", ("<minimax:tool_call>",), "minimax_m2"),
        ("{{ tools }}", ("<|tool_call>", "<tool_call|>", '<|"|>'), "gemma4"),
        ({"default": "x", "tool_use": '<tool_call>{"name": 1}</tool_call>'}, (), "hermes"),
        ({"default": "<|python_tag|>"}, (), "llama3_json"),
    ],
)
def test_templates_in_few_words(template: Any, marks: tuple[str, ...], expected: str) -> None:
    tokenizer = byte_level_tokenizer(marks)
    tokenizer.chat_template = template
    assert detect_parser(tokenizer) == expected


WITHOUT_CALLS = {"lfm2", "deepseek_r1_distill"}  # these templates leave past calls out
WITH_CALLS = sorted(
    name for name, parser in EXPECTED.items() if parser != "none" and name not in WITHOUT_CALLS
)


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "no thinking"])
@pytest.mark.parametrize("name", WITH_CALLS)
def test_what_a_template_renders_is_parsed(name: str, thinking: bool) -> None:
    """Render a call with the model's own template, and take what follows the prompt as sampled."""
    tokenizer: Any = byte_level_tokenizer(SPECIAL, template=trl_templates()[name], eos=_eos(name))
    function = {"name": "forecast", "description": "Weather.", "parameters": PARAMETERS}
    arguments: Any = json.dumps(ARGUMENTS, ensure_ascii=False) if "deepseek" in name else ARGUMENTS
    call = {"type": "function", "id": "call00001", "function": {"name": "forecast", "arguments": arguments}}
    question = [{"role": "user", "content": "How is the weather?"}]
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": function}]
    prompt = tokenizer.apply_chat_template(question, tools=tools, tokenize=False, add_generation_prompt=True)
    if thinking and not prompt.rstrip().endswith("</think>"):
        answer |= dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "Let me see.")
    whole = tokenizer.apply_chat_template([*question, answer], tools=tools, tokenize=False)
    if whole.startswith(prompt):
        generation = whole.removeprefix(prompt)
    else:  # DeepSeek's templates leave past thinking out
        assert prompt.endswith("<think>\n")
        generation = "Let me see.\n</think>" + whole.removeprefix(prompt.removesuffix("<think>\n"))
    parser = make_parser(detect_parser(tokenizer), tokenizer, frozenset({tokenizer.eos_token_id}))
    ids = tokenizer.encode(generation.rstrip("\n"), add_special_tokens=False)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    tool = FunctionTool(name="forecast", parameters=PARAMETERS)
    output = parser.parse(ids, prompt=prompt_ids, tools=[tool])
    call_item = output.items[-1]
    assert isinstance(call_item, FunctionCall), shown(output.items)
    assert call_item.name == "forecast"
    assert json.loads(call_item.arguments) == ARGUMENTS
    assert output.unparsed_calls == 0
    assert all(kind != "text" for kind, *_ in shown(output.items))


def _eos(name: str) -> str:
    if "deepseek" in name:
        return "<｜end▁of▁sentence｜>"
    if name.startswith("llama"):
        return "<|eot_id|>"
    if "gemma" in name:
        return "<turn|>" if name == "gemma4_v2" else "<|tool_response>"
    closing = {"gptoss": "<|call|>", "glm4moe": "<|user|>", "muse_glimmer": "<|eot|>"}
    return closing.get(name, "<|im_end|>")


KEYS = st.from_regex(r"[A-Za-z_][\w .-]{0,8}(?<! )", fullmatch=True)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=8)


@pytest.mark.parametrize("name", [name for name in WITH_CALLS if EXPECTED[name] in ("atem", "gemma4")])
@settings(deadline=None)  # the first example makes the renderers
@given(calls=st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=3))
def test_any_arguments_come_back(name: str, calls: list[dict[str, Any]]) -> None:
    renderer = renderers()[name]
    properties = {key: {"type": _type_of(value)} for call in calls for key, value in call.items()}
    tool = FunctionTool(name="f", parameters={"type": "object", "properties": properties})
    question = {"role": "user", "content": "."}
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": f"call0000{index}", "function": {"name": "f", "arguments": call}}
            for index, call in enumerate(calls)
        ],
    }
    prompt = renderer.template.render([question], generation_prompt=True)
    whole = renderer.template.render([question, answer])
    assert whole.startswith(prompt)
    ids = renderer.encode(whole.removeprefix(prompt).rstrip("\n"))
    output = renderer.parse(ids, prompt=renderer.encode(prompt), tools=[tool])
    assert all(isinstance(item, FunctionCall) for item in output.items), shown(output.items)
    found = [json.loads(item.arguments) for item in output.items if isinstance(item, FunctionCall)]
    assert found == calls
    assert output.unparsed_calls == 0


def _type_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
