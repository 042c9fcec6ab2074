"""Which tools a request offers and demands, in all its forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.demands import demand_of
from backends.tool_use import ToolUse, as_functions
from gym_sdk.errors import PolicyError
from gym_sdk.schema import (
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    ResponseRequest,
)

F = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
G = {"type": "function", "name": "g"}
SHELL = {"type": "custom", "name": "shell", "description": "Runs a command."}
TOOLS = [F, G, SHELL]


def read(tools: list[dict[str, Any]] = TOOLS, **fields: Any) -> ToolUse:
    return ToolUse.of(ResponseRequest(input="q", tools=tools, **fields))


def named(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "name": name}


@pytest.mark.parametrize(
    ("fields", "offered", "demanded", "most", "forbidden"),
    [
        ({}, {"f", "g", "shell"}, None, None, False),
        ({"tool_choice": "auto", "max_tool_calls": 3}, {"f", "g", "shell"}, None, 3, False),
        ({"parallel_tool_calls": False, "max_tool_calls": 3}, {"f", "g", "shell"}, None, 1, False),
        ({"parallel_tool_calls": True}, {"f", "g", "shell"}, None, None, False),
        ({"tool_choice": "none"}, set(), None, None, True),
        ({"tool_choice": "required"}, {"f", "g", "shell"}, {"f", "g", "shell"}, None, False),
        ({"tool_choice": named("function", "g")}, {"f", "g", "shell"}, {"g"}, 1, False),
        ({"tool_choice": named("custom", "shell")}, {"f", "g", "shell"}, {"shell"}, 1, False),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [named("function", "g")]}},
            {"g"},
            None,
            None,
            False,
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [named("function", "g")]}},
            {"f", "g", "shell"},
            {"g"},
            None,
            False,
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "none", "tools": [named("function", "g")]}},
            set(),
            None,
            None,
            True,
        ),
    ],
)
def test_choices(
    fields: dict[str, Any],
    offered: set[str],
    demanded: set[str] | None,
    most: int | None,
    forbidden: bool,
) -> None:
    use = read(**fields)
    assert {tool.name for tool in use.offered} == offered
    assert use.demanded == demanded
    assert use.max_calls == most
    assert use.forbidden is forbidden
    assert use.custom <= offered | {"shell"}


def test_no_tools_can_be_left_alone_without_being_forbidden() -> None:
    assert not read([], tool_choice="none").forbidden


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([F, F], None, "tools[1].name"),
        ([F, {**SHELL, "name": "f"}], None, "tools[1].name"),
        ([{"type": "function"}], None, "tools[0].name"),
        ([{**F, "name": ""}], None, "tools[0].name"),
        ([{**F, "strict": "yes"}], None, "tools[0].strict"),
        ([{"type": "mcp"}], None, "tools[0].type"),
        (
            [{**SHELL, "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}],
            None,
            "tools[0].format",
        ),
        ([F], named("function", "h"), "tool_choice.name"),
        ([F], {"type": "function"}, "tool_choice.name"),
        ([F], {"type": "file_search"}, "tool_choice.type"),
        ([F], {"type": "allowed_tools", "tools": []}, "tool_choice.tools"),
        ([F], {"type": "allowed_tools", "tools": [named("function", "h")]}, "tool_choice.tools[0].name"),
        ([F], {"type": "allowed_tools", "tools": [named("function", "f")], "mode": "x"}, "tool_choice.mode"),
        ([F], "any", "tool_choice"),
        ([], "required", "tool_choice"),
    ],
)
def test_what_cannot_be_honoured_is_named(tools: list[Any], choice: Any, param: str) -> None:
    with pytest.raises(PolicyError) as caught:
        read(tools, tool_choice=choice)
    assert (caught.value.status, caught.value.param) == (400, param)


@given(st.text())
def test_a_custom_call_is_a_function_call_and_back(text: str) -> None:
    use = read()
    call = CustomToolCall(id="ctc_1", call_id="call_1", name="shell", input=text)
    output = CustomToolCallOutput(call_id="call_1", output="done")
    (inner, answer) = as_functions([call, output])
    assert isinstance(inner, FunctionCall)
    assert answer == FunctionCallOutput(id=None, call_id="call_1", output="done")
    outer = use.presented(inner)
    assert isinstance(outer, CustomToolCall)
    assert (outer.id, outer.call_id, outer.name, outer.input) == ("ctc_1", "call_1", "shell", text)


@pytest.mark.parametrize("arguments", ["ls", "[1]", '{"input": 1}', '{"input": "ls", "more": 1}', "{}"])
def test_what_a_policy_writes_otherwise_is_the_input(arguments: str) -> None:
    call = read().presented(FunctionCall(call_id="c", name="shell", arguments=arguments))
    assert isinstance(call, CustomToolCall)
    assert call.input == arguments


@pytest.mark.parametrize(
    ("fields", "strict", "calls", "has_schema"),
    [
        ({}, False, None, False),
        ({}, True, "auto", False),
        ({"tool_choice": "required"}, False, "required", False),
        ({"tool_choice": "none"}, True, "none", False),
        ({"text": {"format": {"type": "json_object"}}}, False, "auto", True),
        ({"text": {"format": {"type": "json_object"}}, "tool_choice": "none"}, False, "none", True),
        ({"text": {"format": {"type": "json_object"}}, "tool_choice": "required"}, False, "required", False),
        ({"text": {"format": {"type": "text"}}}, False, None, False),
    ],
)
def test_demands(fields: dict[str, Any], strict: bool, calls: str | None, has_schema: bool) -> None:
    request = ResponseRequest(input="q", tools=TOOLS, **fields)
    demand = demand_of(request, ToolUse.of(request), strict=strict)
    assert (None if demand is None else demand.calls) == calls
    assert (demand is not None and demand.schema is not None) is has_schema
