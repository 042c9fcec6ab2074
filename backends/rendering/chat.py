"""Responses items as the chat messages that Hugging Face chat templates expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pydantic_core import from_json, to_json

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

__all__ = ["Wrap", "chat_messages", "chat_tools", "is_policy_item", "texts_of"]

Wrap: TypeAlias = Callable[[int, str], str]
"""Changes a text, given the index of its item."""


def is_policy_item(item: Item) -> bool:
    """Whether the item is of a kind that a policy generates."""
    if isinstance(item, Message):
        return item.role == "assistant"
    return isinstance(item, Reasoning | FunctionCall)


def chat_messages(
    items: Sequence[Item],
    instructions: str | None = None,
    *,
    first: int = 0,
    names: Mapping[str, str] | None = None,
    wrap: Wrap | None = None,
) -> list[dict[str, Any]]:
    """Convert items into chat messages; neighbouring policy items become one assistant message.

    Args:
        items: what to convert.
        instructions: a system message in front of them.
        first: index of the first item in the whole input, for errors and marks.
        names: names of functions called before these items, by call id.
        wrap: changes each text of an item, given the item's index.

    Raises:
        PolicyError: an item or content part has no counterpart in a chat; `param` names it.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    known = dict(names or {})
    open_turn = False
    for index, item in enumerate(items, first):
        if is_policy_item(item):
            if not open_turn:
                messages.append({"role": "assistant", "content": ""})
            _add_to_turn(messages[-1], item, index, wrap or _as_it_is)
            if isinstance(item, FunctionCall):
                known[item.call_id] = item.name
            open_turn = True
            continue
        open_turn = False
        messages.append(_context_message(item, index, known, wrap or _as_it_is))
    return messages


def texts_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what messages say, in one text."""
    texts: list[str] = []
    for message in messages:
        texts += (message["content"] or "", message.get("reasoning_content", ""))
        for call in message.get("tool_calls", ()):
            texts.append(call["function"]["name"])
            arguments = call["function"]["arguments"]
            texts.append(arguments if isinstance(arguments, str) else to_json(arguments).decode())
    return "\n".join(texts)


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


def _as_it_is(index: int, text: str) -> str:
    return text


def _add_to_turn(turn: dict[str, Any], item: Item, index: int, wrap: Wrap) -> None:
    if isinstance(item, Message):
        text = wrap(index, _text(item.content, f"input[{index}].content"))
        # two messages in a row are two turns, which many templates take only as one
        between = "\n\n" if turn["content"] and text else ""
        turn["content"] += between + text
    elif isinstance(item, Reasoning):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + wrap(index, item.text)
    elif isinstance(item, FunctionCall):
        arguments = _wrapped(_arguments(item.arguments), index, wrap)
        call = {"name": wrap(index, item.name), "arguments": arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})


def _context_message(item: Item, index: int, names: Mapping[str, str], wrap: Wrap) -> dict[str, Any]:
    if isinstance(item, Message):
        role = "system" if item.role == "developer" else item.role
        return {"role": role, "content": wrap(index, _text(item.content, f"input[{index}].content"))}
    if isinstance(item, FunctionCallOutput):
        message = {
            "role": "tool",
            "tool_call_id": item.call_id,
            "content": wrap(index, _text(item.output, f"input[{index}].output")),
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


def _wrapped(value: Any, index: int, wrap: Wrap) -> Any:
    if isinstance(value, str):
        return wrap(index, value)
    if isinstance(value, dict):
        return {name: _wrapped(entry, index, wrap) for name, entry in value.items()}
    if isinstance(value, list):
        return [_wrapped(entry, index, wrap) for entry in value]
    return value
