"""What the package needs to know of a conversation, and what has to be seen of it in a rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json

from backends.rendering.chat import chat_messages, is_policy_item
from backends.rendering.renderer import Conversation
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item

__all__ = ["USER", "first_items", "names_of_calls", "neutral_history", "new_messages", "unseen"]

USER: Mapping[str, Any] = {"role": "user", "content": "."}


def new_messages(conversation: Conversation, start: int) -> list[dict[str, Any]]:
    """Convert the items from `start` on; outputs name the functions that were called before.

    Raises:
        PolicyError: an item has no counterpart in a chat.
    """
    names = names_of_calls(conversation, start)
    return chat_messages(conversation.items[start:], first=start, names=names)


def names_of_calls(conversation: Conversation, start: int) -> dict[str, str]:
    """Return the functions that outputs from `start` on answer, by call id; it looks back no further."""
    missing = {item.call_id for item in conversation.items[start:] if isinstance(item, FunctionCallOutput)}
    names: dict[str, str] = {}
    for index in range(start - 1, -1, -1):
        if not missing:
            break
        item = conversation.items[index]
        if isinstance(item, FunctionCall) and item.call_id in missing:
            names[item.call_id] = item.name
            missing.discard(item.call_id)
    return names


def neutral_history(conversation: Conversation, start: int, thought: str) -> list[dict[str, Any]]:
    """Return messages that may stand before the items from `start` on; the last one holds a thought."""
    turn: dict[str, Any] = {"role": "assistant", "content": "a", "reasoning_content": thought}
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}
        for call_id, name in reversed(names_of_calls(conversation, start).items())
    ]
    if calls:
        turn.update(content="", tool_calls=calls)
    return [*chat_messages([], conversation.instructions), dict(USER), turn]


def first_items(conversation: Conversation) -> list[int]:
    """Return for each message of the conversation the index of its first item, -1 for the instructions."""
    items: list[int] = [-1] if conversation.instructions else []
    previous: Item | None = None
    for index, item in enumerate(conversation.items):
        if previous is None or not (is_policy_item(item) and is_policy_item(previous)):
            items.append(index)
        previous = item
    return items


def unseen(items: Sequence[Item], text: str, first: int = 0) -> str | None:
    """Return the field of the first item that a rendering does not show, if there is one.

    Of the policy's own items only the calls' names count: families drop thinking, and text beside it.

    Args:
        items: what was rendered.
        text: their rendering.
        first: index of the first of them in the whole conversation.
    """
    for index, item in enumerate(items, first):
        if isinstance(item, FunctionCall):
            said = item.name
        elif is_policy_item(item):
            continue
        else:
            said = str(getattr(item, "text", "")).strip()
        if said not in text and to_json(said).decode()[1:-1] not in text:
            return f"input[{index}]"
    return None
