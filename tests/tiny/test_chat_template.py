from typing import Any

import pytest

from backends.tiny.families.calculator import CALCULATOR_TOOL
from backends.tiny.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(2048)
ADD_TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}},
}
USER = {"role": "user", "content": "What is 2 + 3?"}


def render(messages: list[dict[str, Any]], **kwargs: Any) -> str:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def call(arguments: Any, name: str = "calculator") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_question_with_a_tool() -> None:
    assert render([USER], tools=[CALCULATOR_TOOL], add_generation_prompt=True) == (
        "<|im_start|>system\ntools: calculator(expression)<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_descriptions_do_not_change_the_prompt() -> None:
    function = {**CALCULATOR_TOOL["function"], "description": "Another.", "strict": True}
    with_outer = render([USER], tools=[{"type": "function", "function": function}])
    assert with_outer == render([USER], tools=[CALCULATOR_TOOL])
    # some servers hand over the function without its wrapper
    assert with_outer == render([USER], tools=[function])


def test_several_tools_and_a_tool_without_parameters() -> None:
    now = {"type": "function", "function": {"name": "now"}}
    assert "tools: add(a, b), now()<|im_end|>" in render([USER], tools=[ADD_TOOL, now])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages(role: str) -> None:
    system = {"role": role, "content": "Be brief."}
    head = "<|im_start|>system\nBe brief."
    assert render([system, USER]).startswith(f"{head}<|im_end|>\n<|im_start|>user\n")
    assert render([system, USER], tools=[ADD_TOOL]).startswith(f"{head}\n\ntools: add(a, b)<|im_end|>\n")
    assert render([USER, system]).endswith(f"{head}<|im_end|>\n")


def test_without_system_and_tools_there_is_no_system_turn() -> None:
    assert render([USER]) == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"


@pytest.mark.parametrize("arguments", [{"expression": "2 + 3"}, '{"expression": "2 + 3"}'])
def test_tool_calls_as_object_or_text(arguments: Any) -> None:
    assert render([USER, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}]).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "2 + 3"}}\n'
        "</tool_call><|im_end|>\n"
    )


def test_malformed_arguments_stay_as_written() -> None:
    text = render([USER, {"role": "assistant", "tool_calls": [call('{"expression": ')]}])
    assert '"arguments": {"expression": }\n</tool_call>' in text


def test_several_calls_and_grouped_responses() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "Both.", "tool_calls": [call({"a": "é"}), call({}, name="now")]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "5 at noon."},
    ]
    assert render(messages).endswith(
        '<|im_start|>assistant\nBoth.\n<tool_call>\n{"name": "calculator", "arguments": {"a": "é"}}'
        '\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
        "<|im_end|>\n"
        "<|im_start|>assistant\n5 at noon.<|im_end|>\n"
    )


def test_content_parts_and_foreign_assistant_messages() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "image", "url": "x"}, {"type": "text", "text": "two"}]
    text = render([{"role": "user", "content": parts}, {"role": "assistant", "content": "hello"}, USER])
    assert text.startswith(
        "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\n"
    )


def test_reasoning_is_shown_after_the_last_question_and_stripped_before() -> None:
    thought = {"role": "assistant", "reasoning_content": "\nhm\n", "content": "5"}
    shown = "<|im_start|>assistant\n<think>\nhm\n</think>\n\n5<|im_end|>\n"
    assert render([USER, thought]).endswith(shown)
    assert render([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}]).endswith(shown)
    assert "<|im_start|>assistant\n5<|im_end|>\n" in render([USER, thought, USER])


def test_reasoning_stays_through_a_tool_loop() -> None:
    thought = {"role": "assistant", "reasoning_content": "hm", "tool_calls": [call({})]}
    assert "<think>\nhm\n</think>\n\n<tool_call>" in render([USER, thought, {"role": "tool", "content": "5"}])


def test_thinking_turned_off() -> None:
    off = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    prompt = render([USER], add_generation_prompt=True, enable_thinking=False)
    assert prompt.endswith(off)
    assert render([USER], add_generation_prompt=True, enable_thinking=True).endswith(
        "<|im_start|>assistant\n"
    )
    # a further turn of the same tool loop extends the prompt that was sampled from
    answered = [USER, {"role": "assistant", "content": "5"}]
    assert render(answered, enable_thinking=False) == f"{prompt}5<|im_end|>\n"


def test_a_history_extends_every_prompt_before_it() -> None:
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call({"expression": "2 + 3"})]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "The answer is 5."},
    ]
    whole = TOKENIZER.encode(render(messages, tools=[CALCULATOR_TOOL]))
    for end in (1, 3):
        prompt = render(messages[:end], tools=[CALCULATOR_TOOL], add_generation_prompt=True)
        token_ids = TOKENIZER.encode(prompt)
        assert whole[: len(token_ids)] == token_ids
