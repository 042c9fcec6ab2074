"""What may stand before new items when only they are rendered, and what has to be seen of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import to_json

from backends.rendering.attribution import Span
from backends.rendering.chat import is_policy_item
from backends.rendering.renderer import Conversation
from gym_sdk.schema import FunctionCall, FunctionCallOutput, Item, Message

__all__ = ["earlier_calls", "left_out", "neutral_turn", "unused_words"]


def neutral_turn(conversation: Conversation, start: int, word: str, *, calls: bool) -> dict[str, Any]:
    """Return an assistant message that may stand before the items from `start` on and ends with `word`.

    Args:
        conversation: the whole conversation.
        start: index of the first new item.
        word: the last text of the message.
        calls: whether the message may call the functions whose outputs come next.
    """
    next_ids: set[str] = set()
    for item in conversation.items[start:] if calls else ():
        if not isinstance(item, FunctionCallOutput):
            break
        next_ids.add(item.call_id)
    answered = [call for call in earlier_calls(conversation, start) if call.call_id in next_ids]
    turn: dict[str, Any] = {"role": "assistant", "content": "" if answered else word}
    if answered:
        turn["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": {word: word}},
            }
            for call in answered
        ]
    return turn


def earlier_calls(conversation: Conversation, start: int) -> list[FunctionCall]:
    """Return the calls before `start` that later outputs answer, in the order in which they were made.

    It looks back only as far as the earliest of them.
    """
    missing: set[str] = set()
    made: set[str] = set()
    for item in conversation.items[start:]:
        if isinstance(item, FunctionCall):
            made.add(item.call_id)
        elif isinstance(item, FunctionCallOutput) and item.call_id not in made:
            missing.add(item.call_id)
    calls: list[FunctionCall] = []
    for index in range(start - 1, -1, -1):
        if not missing:
            break
        item = conversation.items[index]
        if isinstance(item, FunctionCall) and item.call_id in missing:
            calls.append(item)
            missing.discard(item.call_id)
    return calls[::-1]


def left_out(
    conversation: Conversation, start: int, text: str, spans: Sequence[Span] | None = None
) -> int | None:
    """Return the index of the first item from `start` on that a rendering does not show, if there is one.

    If everything was rendered, what the policy said may be missing: templates drop thinking, and text beside
    calls. Among new items, an assistant message is somebody else's, and has to be seen.

    Args:
        conversation: the whole conversation.
        start: index of the first item that was rendered.
        text: the rendering.
        spans: where the items' texts stand in it; None if that can't be told, and they are searched for.
    """
    shown = None if spans is None else {span.item for span in spans}
    position = 0
    for index, item in enumerate(conversation.items[start:], start):
        said = _said(item, sampled=start == 0)
        if not said:
            continue
        if shown is not None:
            if index not in shown:
                return index
            continue
        at = _find(text, said, position)
        if at < 0:
            return index
        position = at + len(said)
    return None


def unused_words(texts: str) -> tuple[str, str]:
    """Return two words that do not occur in a text."""
    words = _words()
    return next(w for w in words if w not in texts), next(w for w in words if w not in texts)


def _said(item: Item, *, sampled: bool) -> str:
    """Return what has to be seen of an item."""
    if isinstance(item, FunctionCall):
        return item.name
    if is_policy_item(item) and (sampled or not isinstance(item, Message)):
        return ""
    return str(getattr(item, "text", "")).strip()


def _find(text: str, said: str, start: int) -> int:
    at = text.find(said, start)
    return at if at >= 0 else text.find(to_json(said).decode()[1:-1], start)


def _words() -> Iterator[str]:
    number = 0
    while True:
        yield f"qzv{number}"
        yield f"xwk{number}k"
        number += 1
