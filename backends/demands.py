"""What a request demands of the generation, apart from what it hopes for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backends.constraints import ANY_OBJECT, Demand
from backends.requests import invalid
from backends.tool_use import ToolUse
from gym_sdk.schema import ResponseRequest

__all__ = ["demand_of"]


def demand_of(request: ResponseRequest, tool_use: ToolUse, *, strict: bool) -> Demand | None:
    """Return what a request demands of the generation; None if nothing."""
    form = request.text.format if request.text is not None else None
    schema: Mapping[str, Any] | None = None
    if form is not None and form.type != "text":
        if form.type == "json_schema" and form.schema_ is None:
            raise invalid("text.format.schema", "is missing")
        schema = ANY_OBJECT if form.type == "json_object" else form.schema_
    held = strict and any(tool.strict for tool in tool_use.offered)
    if tool_use.demanded is None and schema is None and not held and not tool_use.forbidden:
        return None
    if tool_use.demanded is not None:
        # a schema is for answers, and there will be none
        return Demand("required", names=tool_use.demanded, max_calls=tool_use.max_calls)
    calls: Literal["auto", "none"] = "auto" if tool_use.offered else "none"
    return Demand(calls, max_calls=tool_use.max_calls, schema=schema, calls_param="tools")
