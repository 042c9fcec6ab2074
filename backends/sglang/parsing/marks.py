"""Marks of the formats that SGLang's parsers read, and the names of those parsers.

SGLang's routes take a whole text and lose where in it the calls stood, and some lose text and calls. With the
marks, each section of calls can be sent alone, and what stands around it is kept.
"""

# ruff: noqa: RUF001 - DeepSeek spells its tokens with full-width bars

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REASONING_PARSERS", "TOOL_PARSERS", "Section", "Thought"]


@dataclass(frozen=True, slots=True)
class Section:
    """Marks around calls.

    Attributes:
        opener: opens a call, or a section of calls.
        closer: closes it.
        each_opener: opens one call in a section of several; empty if a section is one call.
        each_closer: closes one.
    """

    opener: str
    closer: str
    each_opener: str = ""
    each_closer: str = ""


@dataclass(frozen=True, slots=True)
class Thought:
    """Marks around thinking."""

    opener: str
    closer: str


_TOOL_CALL = Section("<tool_call>", "</tool_call>")
_THINK = Thought("<think>", "</think>")
_DEEPSEEK = Section(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
)

TOOL_PARSERS: Mapping[str, Section | None] = {
    "apertus2509": Section("<|tools_prefix|>", "<|tools_suffix|>"),
    "beam": None,
    "cohere_command4": Section("<|START_ACTION|>", "<|END_ACTION|>"),
    "deepseekv3": _DEEPSEEK,
    "deepseekv31": _DEEPSEEK,
    "deepseekv32": Section(
        "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "<｜DSML｜invoke", "</｜DSML｜invoke>"
    ),
    "deepseekv4": Section(
        "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "<｜DSML｜invoke", "</｜DSML｜invoke>"
    ),
    "deepseekv41": Section("<｜DSML｜ calls>", "</｜DSML｜ calls>", "<｜DSML｜ invoke", "</｜DSML｜ invoke>"),
    "dots": Section("<dots_function_call>", "</dots_function_call>"),
    "gemma4": Section("<|tool_call>", "<tool_call|>"),
    "gigachat3": None,
    "gigachat35": Section("<｜GCML｜tool_calls>", "</｜GCML｜tool_calls>"),
    "glm": _TOOL_CALL,
    "glm45": _TOOL_CALL,
    "glm47": _TOOL_CALL,
    "gpt-oss": None,
    "hermes": _TOOL_CALL,
    "hunyuan": Section("<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>"),
    "inkling": None,
    "interns1": None,
    "iquest_q1": None,
    "k2_horizon": None,
    "kimi_k2": Section(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
    ),
    "kimi_k3": None,
    "lfm2": Section("<|tool_call_start|>", "<|tool_call_end|>"),
    "ling3": _TOOL_CALL,
    "llama3": None,
    "mimo": _TOOL_CALL,
    "minicpm5": None,
    "minimax-m2": Section("<minimax:tool_call>", "</minimax:tool_call>", "<invoke name=", "</invoke>"),
    "minimax-m3": None,
    "mistral": None,
    "muse": None,
    "nanbeige": _TOOL_CALL,
    "poolside_v1": None,
    "pythonic": None,
    "qwen": _TOOL_CALL,
    "qwen25": _TOOL_CALL,
    "qwen3_coder": _TOOL_CALL,
    "response_template": None,
    "spark25": _TOOL_CALL,
    "step3": Section(
        "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>", "<｜tool_call_begin｜>", "<｜tool_call_end｜>"
    ),
    "step3p5": _TOOL_CALL,
    "trinity": _TOOL_CALL,
}
"""SGLang 0.5.23's tool parsers, with the marks of those whose calls stand between marks."""

REASONING_PARSERS: Mapping[str, Thought | None] = {
    "apertus2509": Thought("<|inner_prefix|>", "<|inner_suffix|>"),
    "beam": None,
    "cohere_command4": Thought("<|START_THINKING|>", "<|END_THINKING|>"),
    "deepseek-r1": _THINK,
    "deepseek-v3": _THINK,
    "deepseek-v4": _THINK,
    "deepseek-v41": _THINK,
    "dots": _THINK,
    "gemma4": Thought("<|channel>thought\n", "<channel|>"),
    "gigachat35": _THINK,
    "glm45": _THINK,
    "gpt-oss": None,
    "granite_thinking_parser": _THINK,
    "hunyuan": _THINK,
    "inkling": None,
    "interns1": _THINK,
    "iquest_q1": _THINK,
    "k2_horizon": None,
    "kimi": Thought("◁think▷", "◁/think▷"),
    "kimi_k2": _THINK,
    "kimi_k3": Thought("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    "ling3": _THINK,
    "mimo": _THINK,
    "minimax": _THINK,
    "minimax-append-think": None,
    "minimax-m3": Thought("<mm:think>", "</mm:think>"),
    "mistral": Thought("[THINK]", "[/THINK]"),
    "muse": None,
    "nanbeige": _THINK,
    "nemotron_3": _THINK,
    "poolside_v1": _THINK,
    "qwen3": _THINK,
    "qwen3-thinking": _THINK,
    "response_template": None,
    "step3": _THINK,
    "step3p5": _THINK,
}
"""SGLang 0.5.23's reasoning parsers, with the marks of those that have one pair."""
