"""Tools: typed Python functions that a policy may call."""

from gym_sdk.tools.context import ToolContext
from gym_sdk.tools.function_tool import Tool, ToolLike, resolve_tools, tool

__all__ = ["Tool", "ToolContext", "ToolLike", "resolve_tools", "tool"]
