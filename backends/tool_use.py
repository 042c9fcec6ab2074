"""Which tools a request offers, and which of them it demands or allows to be called.

A custom tool takes free text. For the policy it is a function with one text argument, `input`; its calls and
outputs become function calls and outputs on their way in, and calls of it custom calls on their way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from backends.requests import invalid, refuse
from gym_sdk.errors import PolicyError
from gym_sdk.schema import (
    CustomTool,
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    Item,
    ResponseRequest,
    Tool,
)

__all__ = ["ToolUse", "as_functions"]

_MAX_TOOLS = 1024
_INPUT = "input"
_INPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {_INPUT: {"type": "string"}},
    "required": [_INPUT],
    "additionalProperties": False,
}
_MODELS: Mapping[str, type[FunctionTool] | type[CustomTool]] = {
    "function": FunctionTool,
    "custom": CustomTool,
}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools.

    Attributes:
        offered: the functions that the policy is told of.
        custom: the names of those that stand for custom tools.
        demanded: names of which at least one must be called; None: the policy is free to call.
        max_calls: how many calls the generation may make; None: any number.
        forbidden: whether there are tools, and the policy must not call any.
    """

    offered: Sequence[FunctionTool] = ()
    custom: frozenset[str] = frozenset()
    demanded: frozenset[str] | None = None
    max_calls: int | None = None
    forbidden: bool = False

    @classmethod
    def of(cls, request: ResponseRequest, tools: Sequence[Tool] | None = None) -> ToolUse:
        """Read a request.

        Args:
            request: what is asked.
            tools: the tools, where they aren't the request's own.

        Raises:
            PolicyError: a tool or the choice cannot be honoured; `param` names it.
        """
        read = _read_tools(request.tools if tools is None else tools)
        functions = [_function(tool) for tool in read]
        custom = frozenset(tool.name for tool in read if isinstance(tool, CustomTool))
        names = frozenset(tool.name for tool in functions)
        limits = [limit for limit in (request.max_tool_calls,) if limit is not None]
        if request.parallel_tool_calls is False:
            limits.append(1)
        choice = request.tool_choice
        if isinstance(choice, Mapping):
            kind = choice.get("type")
            if kind == "allowed_tools":
                return cls._allowed(choice, functions, custom, names, limits)
            if kind not in ("function", "custom"):
                raise refuse("tool_choice.type", f"tools of type {kind!r} don't run here")
            name = _named(choice, "tool_choice", names)
            return cls(functions, custom, frozenset({name}), 1)
        if choice in (None, "auto"):
            return cls(functions, custom, None, min(limits, default=None))
        if choice == "none":
            return cls(forbidden=bool(functions))
        if choice == "required":
            if not functions:
                raise invalid("tool_choice", "is `required`, and there are no tools")
            return cls(functions, custom, names, min(limits, default=None))
        raise invalid("tool_choice", f"must be `auto`, `none`, `required` or an object, not {choice!r}")

    @classmethod
    def _allowed(
        cls,
        choice: Mapping[str, Any],
        functions: Sequence[FunctionTool],
        custom: frozenset[str],
        names: frozenset[str],
        limits: Sequence[int],
    ) -> ToolUse:
        mode, entries = choice.get("mode", "auto"), choice.get("tools")
        if mode not in ("auto", "required", "none"):
            raise invalid("tool_choice.mode", f"must be `auto` or `required`, not {mode!r}")
        if not isinstance(entries, list) or not entries:
            raise invalid("tool_choice.tools", "must be a list of at least one tool")
        allowed = frozenset(
            _named(entry, f"tool_choice.tools[{index}]", names) for index, entry in enumerate(entries)
        )
        if mode == "none":
            return cls(forbidden=True)
        limit = min(limits, default=None)
        if mode == "required":
            return cls(functions, custom, allowed, limit)
        # The policy isn't told of the others: nothing else keeps it from calling them.
        return cls([tool for tool in functions if tool.name in allowed], custom & allowed, None, limit)

    def presented(self, item: Item) -> Item:
        """Return a sampled item as the client knows it: a call of a custom tool becomes a custom call."""
        if not isinstance(item, FunctionCall) or item.name not in self.custom:
            return item
        return CustomToolCall(
            id=item.id,
            call_id=item.call_id,
            name=item.name,
            input=_input_of(item.arguments),
            status=item.status,
        )


def as_functions(items: Iterable[Item]) -> list[Item]:
    """Return the items with custom calls and their outputs as those of the functions that stand for them."""
    return [_as_function(item) for item in items]


def _as_function(item: Item) -> Item:
    tokens = item.tokens
    if isinstance(item, CustomToolCall):
        arguments = to_json({_INPUT: item.input}).decode()
        call = FunctionCall(
            id=item.id, call_id=item.call_id, name=item.name, arguments=arguments, status=item.status
        )
        return call if tokens is None else call.with_tokens(tokens)
    if isinstance(item, CustomToolCallOutput):
        return FunctionCallOutput(id=item.id, call_id=item.call_id, output=item.output)
    return item


def _input_of(arguments: str) -> str:
    """Return the text that a call of a custom tool carries; what isn't written as asked stays as it is."""
    try:
        value = from_json(arguments)
    except ValueError:
        return arguments
    if isinstance(value, dict) and set(value) == {_INPUT} and isinstance(value[_INPUT], str):
        return str(value[_INPUT])
    return arguments


def _read_tools(entries: Sequence[Tool] | None) -> list[FunctionTool | CustomTool]:
    tools: list[FunctionTool | CustomTool] = []
    seen: set[str] = set()
    if len(entries or ()) > _MAX_TOOLS:
        raise invalid("tools", f"has {len(entries or ())} entries; {_MAX_TOOLS} are the most")
    for index, entry in enumerate(entries or ()):
        tool = _read_tool(entry, f"tools[{index}]")
        if tool.name in seen:
            raise invalid(f"tools[{index}].name", f"is {tool.name!r}, as of an earlier tool")
        seen.add(tool.name)
        tools.append(tool)
    return tools


def _read_tool(entry: Tool, param: str) -> FunctionTool | CustomTool:
    if isinstance(entry, Mapping):
        kind = entry.get("type")
        if not isinstance(kind, str) or kind not in _MODELS:
            raise refuse(f"{param}.type", f"only function and custom tools run here, not {kind!r}")
        try:
            entry = _MODELS[kind].model_validate(entry)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join([param, *(str(part) for part in detail["loc"])])
            raise PolicyError(f"{where}: {detail['msg']}", code="invalid_value", param=where) from error
    if isinstance(entry, CustomTool) and (entry.format or {}).get("type", "text") != "text":
        raise refuse(f"{param}.format", "a custom tool's input cannot be held to a grammar here")
    assert isinstance(entry, FunctionTool | CustomTool)
    return entry


def _function(tool: FunctionTool | CustomTool) -> FunctionTool:
    if isinstance(tool, FunctionTool):
        return tool
    return FunctionTool(name=tool.name, description=tool.description, parameters=_INPUT_SCHEMA)


def _named(choice: Any, param: str, names: frozenset[str]) -> str:
    name = choice.get("name") if isinstance(choice, Mapping) else None
    if not isinstance(name, str) or name not in names:
        raise invalid(f"{param}.name", f"is {name!r}, which is none of the tools")
    return name
