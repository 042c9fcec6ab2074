"""Which request fields this server honours; everything else is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionTool, ResponseRequest

__all__ = ["check_supported", "function_tools", "refuse"]

_HARMLESS = frozenset(
    # they carry labels or hints, and change nothing about what is generated
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "include"}
)


def refuse(param: str, message: str) -> PolicyError:
    """Return the error for a field that this server cannot honour."""
    return PolicyError(message, code="unsupported_parameter", param=param)


def check_supported(request: ResponseRequest) -> None:
    """Refuse what this server would otherwise ignore.

    Raises:
        PolicyError: `param` names the field.
    """
    if request.stream:
        raise refuse("stream", "a policy answers in one piece; its server makes the stream")
    if request.parallel_tool_calls is False:
        raise refuse("parallel_tool_calls", "parallel tool calls cannot be switched off here")
    if request.tool_choice not in (None, "auto", "none"):
        raise refuse("tool_choice", "tool_choice must be `auto` or `none` here")
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _HARMLESS or _is_default(name, value):
            continue
        raise refuse(name, f"the parameter {name!r} is not supported by this server")


def _is_default(name: str, value: Any) -> bool:
    """Whether the value says what the server does anyway."""
    if name == "text":
        form = value.get("format") if isinstance(value, Mapping) else None
        return isinstance(value, Mapping) and set(value) <= {"format"} and form in (None, {"type": "text"})
    defaults: dict[str, tuple[Any, ...]] = {
        "truncation": ("disabled",),
        "background": (False,),
        "top_logprobs": (0,),
        "reasoning": ({},),
        "stream_options": ({},),
    }
    return value in defaults.get(name, ())


def function_tools(request: ResponseRequest) -> list[FunctionTool]:
    """Return the request's tools, checked.

    Raises:
        PolicyError: a tool is not a function tool; `param` names it.
    """
    tools: list[FunctionTool] = []
    for index, entry in enumerate(request.tools or ()):
        param = f"tools[{index}]"
        if isinstance(entry, Mapping):
            if entry.get("type") != "function":
                raise refuse(f"{param}.type", f"only function tools run here, not {entry.get('type')!r}")
            try:
                entry = FunctionTool.model_validate(entry)
            except ValidationError as error:
                raise PolicyError(f"{param}: {error}", param=param) from error
        tools.append(entry)
    return tools
