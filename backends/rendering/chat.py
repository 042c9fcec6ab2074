"""Responses items as the chat messages that Hugging Face chat templates expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from gym_sdk.errors import PolicyError
from gym_sdk.schema import (
    ContentPart,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    Item,
    Message,
    Reasoning,
    UnknownPart,
    text_of,
)

__all__ = ["chat_messages", "chat_tools", "is_policy_item"]


def is_policy_item(item: Item) -> bool:
    """Whether the item is of a kind that a policy generates."""
    if isinstance(item, Message):
        return item.role == "assistant"
    return isinstance(item, Reasoning | FunctionCall)


def chat_messages(items: Sequence[Item], instructions: str | None = None) -> list[dict[str, Any]]:
    """Convert items into chat messages; neighbouring policy items become one assistant message.

    Raises:
        PolicyError: an item or content part has no counterpart in a chat; `param` names it.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}
    open_turn = False
    for index, item in enumerate(items):
        if is_policy_item(item):
            if not open_turn:
                messages.append({"role": "assistant", "content": ""})
            _add_to_turn(messages[-1], item, index)
            if isinstance(item, FunctionCall):
                names[item.call_id] = item.name
            open_turn = True
            continue
        open_turn = False
        messages.append(_context_message(item, index, names))
    return messages


def chat_tools(tools: Sequence[FunctionTool]) -> list[dict[str, Any]] | None:
    """Convert function tools into the nested form of Chat Completions; None if there are none."""
    converted = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]
    return converted or None


def _add_to_turn(turn: dict[str, Any], item: Item, index: int) -> None:
    if isinstance(item, Message):
        turn["content"] += _text(item.content, f"input[{index}].content")
    elif isinstance(item, Reasoning):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + item.text
    elif isinstance(item, FunctionCall):
        call = {"name": item.name, "arguments": _arguments(item.arguments)}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})


def _context_message(item: Item, index: int, names: dict[str, str]) -> dict[str, Any]:
    if isinstance(item, Message):
        role = "system" if item.role == "developer" else item.role
        return {"role": role, "content": _text(item.content, f"input[{index}].content")}
    if isinstance(item, FunctionCallOutput):
        message = {
            "role": "tool",
            "tool_call_id": item.call_id,
            "content": _text(item.output, f"input[{index}].output"),
        }
        if item.call_id in names:
            message["name"] = names[item.call_id]
        return message
    raise PolicyError(
        f"input[{index}] is an item of type {item.type!r}, which this server cannot render",
        code="unsupported_value",
        param=f"input[{index}].type",
    )


def _text(content: str | Sequence[ContentPart], param: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if isinstance(part, UnknownPart):
            raise PolicyError(
                f"{param}[{index}] is a content part of type {part.type!r}; this server reads text only",
                code="unsupported_value",
                param=f"{param}[{index}].type",
            )
    return text_of(content)


def _arguments(arguments: str) -> Any:
    """Templates print a mapping as JSON; what the policy wrote badly stays the text it was."""
    try:
        value = from_json(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
