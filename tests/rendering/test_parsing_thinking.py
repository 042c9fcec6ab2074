"""Thinking: sampled, opened by the prompt, beside and around calls."""

from __future__ import annotations

import pytest
from support.characters import EOS, CharacterTokens
from support.markup import MARKS, THINK
from support.parsed import shown

from backends.rendering.parsing import PARSERS, make_parser

TURN = ("<|im_start|>", "<|im_end|>")
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
TAGGED = [name for name in PARSERS if name not in ("gpt_oss", "atem", "gemma4")]


@pytest.fixture(params=[True, False], ids=["special tokens", "spelled out"])
def tokens(request: pytest.FixtureRequest) -> CharacterTokens:
    marks = (*THINK, "<tool_call>", "</tool_call>") if request.param else ()
    return CharacterTokens((*TURN, *marks))


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize(
    ("text", "expected", "thinking"),
    [
        ("<think>abc</think>d", [("think", "abc"), ("text", "d")], 5),
        ("<think>cut", [("think", "cut")], 4),
        ("<think></think>d", [("think", ""), ("text", "d")], 2),
        ("a<think>b</think>c</think>d", [("text", "a"), ("think", "b"), ("text", "c</think>d")], 3),
        ("<think>a<think>b</think>c", [("think", "a<think>b"), ("text", "c")], 5),
        ("ab</think>c", [("think", "ab"), ("text", "c")], 3),
    ],
)
def test_sampled_thinking(
    tokens: CharacterTokens, name: str, text: str, expected: list[tuple[str, ...]], thinking: int
) -> None:
    output = make_parser(name, tokens, frozenset({EOS})).parse([*tokens.encode(text), EOS])
    assert shown(output.items) == expected
    if "<think>" in tokens.special:
        assert output.reasoning_tokens == thinking


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", "a</think>b", [("think", "a"), ("text", "b")]),
        ("<|im_start|>assistant\n<think>\n", "a", [("think", "a")]),
        ("<|im_start|>assistant\n<think>\n", f"{CALL}</think>", [("think", CALL)]),
        ("<|im_start|>assistant\n<think>\nSo far", "<think>a</think>", [("think", "<think>a")]),
        ("<|im_start|>assistant\n<think>\n", "", [("text", "")]),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "a</think>b", [("text", "a</think>b")]),
        ("<|im_start|>assistant\n", "a</think>b", [("text", "a</think>b")]),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", "a", [("text", "a")]),
        ("<|im_start|>user\n<think><|im_start|>assistant\n", "a", [("text", "a")]),
        ("<think>" + "x" * 5_000, "a", [("text", "a")]),
    ],
)
def test_the_prompt_decides(
    tokens: CharacterTokens, prompt: str, text: str, expected: list[tuple[str, ...]]
) -> None:
    parser = make_parser("hermes", tokens, frozenset({EOS, tokens.special["<|im_end|>"]}))
    assert shown(parser.parse(tokens.encode(text), prompt=tokens.encode(prompt)).items) == expected


def test_a_call_inside_thinking_is_thinking(tokens: CharacterTokens) -> None:
    parser = make_parser("hermes", tokens, frozenset())
    output = parser.parse(tokens.encode(f"<think>{CALL}</think>{CALL}"))
    assert shown(output.items) == [("think", CALL), ("call", "f", "{}")]


def test_thinking_of_a_thinking_prompt_is_counted() -> None:
    tokens = CharacterTokens(THINK)
    parser = make_parser("none", tokens, frozenset({EOS}))
    assert parser.parse(tokens.encode("ab</think>c"), prompt=tokens.encode("<think>")).reasoning_tokens == 3


def test_magistral_thinks_in_brackets() -> None:
    tokens = CharacterTokens(("[INST]", "[/INST]", "[THINK]", "[/THINK]"))
    parser = make_parser("mistral", tokens, frozenset({EOS}))
    prompt = tokens.encode("[INST]hi[/INST][THINK]")
    output = parser.parse(tokens.encode("a</think>b[/THINK]c"), prompt=prompt)
    assert shown(output.items) == [("think", "a</think>b"), ("text", "c")]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|start|>assistant", "<|channel|>final<|message|>a", [("text", "a")]),
        ("<|start|>assistant<|channel|>analysis<|message|>", "a<|end|>", [("think", "a")]),
        ("<|start|>assistant<|channel|>final<|message|>So ", "a<|return|>", [("text", "a")]),
        ("<|start|>assistant to=functions.f", "<|channel|>commentary<|message|>{}", [("call", "f", "{}")]),
        ("<|start|>user<|message|>hi<|end|>", "<|channel|>analysis<|message|>a", [("think", "a")]),
        ("<|start|>assistant", " to=functions.f<|message|>12", [("text", " to=functions.f<|message|>12")]),
    ],
)
def test_harmony_goes_on_where_the_prompt_ends(
    prompt: str, text: str, expected: list[tuple[str, ...]]
) -> None:
    tokens = CharacterTokens(MARKS["gpt_oss"])
    parser = make_parser("gpt_oss", tokens, frozenset({EOS}))
    assert shown(parser.parse(tokens.encode(text), prompt=tokens.encode(prompt)).items) == expected


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|start|>assistant", " to=self<|message|>a<|eom|>", [("think", "a")]),
        ("<|start|>assistant to=self<|message|>So ", "a", [("think", "a")]),
        ("<|start|>assistant", "<|message|>a<|eot|>", [("text", "a")]),
        ("<|start|>assistant to=self<|message|>a<|eom|>", "b", [("text", "b")]),
        ("<|start|>tool f", "<|message|>a", [("text", "<|message|>a")]),
    ],
)
def test_muse_glimmer_goes_on_where_the_prompt_ends(
    prompt: str, text: str, expected: list[tuple[str, ...]]
) -> None:
    tokens = CharacterTokens(("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"))
    parser = make_parser("atem", tokens, frozenset({EOS}))
    assert shown(parser.parse(tokens.encode(text), prompt=tokens.encode(prompt)).items) == expected


GEMMA = ("<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", '<|"|>')


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|turn>model\n", "<|channel>thought\na\n<channel|>b<turn|>", [("think", "a"), ("text", "b")]),
        ("<|turn>model\n", "a<channel|>b", [("text", "a<channel|>b")]),
        ("<tool_response|><|channel>thought\n", "a\n<channel|>b", [("think", "a"), ("text", "b")]),
        ("<tool_response|><|channel>thought\n", "thought\na", [("think", "thought\na")]),
        ("<|turn>model\n<|channel>thought\n<channel|>", "a", [("text", "a")]),
        ("<|channel>thought\n<|tool_response>response:f{value:1}<tool_response|>", "a", [("text", "a")]),
        ("<|turn>user\n<|channel><|turn>model\n", "a<|tool_response>", [("text", "a")]),
        ("", "a\n<channel|>b<turn|>", [("think", "a"), ("text", "b")]),
    ],
)
def test_gemma_4_thinks_on_a_channel(prompt: str, text: str, expected: list[tuple[str, ...]]) -> None:
    """Its stop tokens are known: a turn that calls ends with another one than an answer."""
    tokens = CharacterTokens(GEMMA)
    parser = make_parser("gemma4", tokens, frozenset({EOS}))
    assert shown(parser.parse(tokens.encode(text), prompt=tokens.encode(prompt)).items) == expected


def test_the_tokens_of_gemma_4_s_thinking_are_counted() -> None:
    tokens = CharacterTokens(GEMMA)
    parser = make_parser("gemma4", tokens, frozenset({EOS}))
    assert parser.parse(tokens.encode("<|channel>thought\nabc\n<channel|>d")).reasoning_tokens == 14
