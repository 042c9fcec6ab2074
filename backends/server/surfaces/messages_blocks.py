"""Content blocks as items, and items as content blocks: whoever echoes a block gives the item back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from backends.ids import is_own_id
from backends.memory import one_spelling
from backends.sealed import is_sealed, seal, unseal
from backends.server.surfaces.messages_body import (
    Block,
    MessageIn,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from gym_sdk.errors import PolicyError
from gym_sdk.schema import (
    TOKEN_FIELDS,
    FunctionCall,
    FunctionCallOutput,
    Item,
    Message,
    Reasoning,
    TextPart,
    text_of,
)

__all__ = ["Placed", "block_of", "placed_items", "tool_input"]

_ALLOWED = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}
_MISCALL = re.compile(
    r"\[call (?P<id>\S+) of (?P<name>.*?) was not made: its arguments are no JSON object\] (?P<arguments>.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Placed:
    """An item, and where in the request it stands, such as `messages.2.content.0`."""

    item: Item
    place: str


def placed_items(messages: Sequence[MessageIn]) -> list[Placed]:
    """Return the items that messages say.

    Raises:
        PolicyError: a block cannot stand where it does, or its thinking was changed.
    """
    return [placed for index, message in enumerate(messages) for placed in _message(message, index)]


def _message(message: MessageIn, index: int) -> list[Placed]:
    place = f"messages.{index}"
    for number, block in enumerate(message.content):
        if not isinstance(block, _ALLOWED[message.role]):
            where = f"{place}.content.{number}"
            raise _invalid(where, f"{block.type!r} blocks cannot stand in messages of the {message.role}")
    blocks = [(f"{place}.content.{number}", block) for number, block in enumerate(message.content)]
    if message.role != "assistant":
        if not blocks:
            raise _invalid(f"{place}.content", "must not be empty")
        return list(_said_to_policy(message.role, blocks))
    # several blocks of text may be left of empty ones; where nothing else was said, the empty one counts
    said = [Placed(_policy_item(block, where), where) for where, block in blocks if not _is_blank(block)]
    said = said or [Placed(Message(role="assistant", content=""), place)]
    tokens = {name: getattr(message, name) for name in TOKEN_FIELDS if getattr(message, name) is not None}
    if tokens:
        last = said[-1]
        try:
            said[-1] = Placed(type(last.item).model_validate({**last.item.to_wire(), **tokens}), last.place)
        except ValidationError as error:
            raise _invalid(place, error.errors(include_url=False)[0]["msg"]) from error
    return said


def _said_to_policy(role: Any, blocks: Iterable[tuple[str, Block]]) -> Iterator[Placed]:
    """Return results of tools one by one, and neighbouring texts as one message."""
    for is_text, group in groupby(blocks, lambda entry: isinstance(entry[1], TextBlock)):
        entries = list(group)
        if is_text:
            texts = "".join(block.text for _, block in entries if isinstance(block, TextBlock))
            yield Placed(Message(role=role, content=texts), entries[0][0])
            continue
        for where, block in entries:
            assert isinstance(block, ToolResultBlock)
            extra = {} if block.is_error is None else {"is_error": block.is_error}
            yield Placed(
                FunctionCallOutput(call_id=block.tool_use_id, output=text_of(block.content), **extra), where
            )


def _is_blank(block: Block) -> bool:
    return isinstance(block, TextBlock) and not block.text


def _policy_item(block: Block, place: str) -> Item:
    match block:
        case ThinkingBlock():
            return _thought(_checked(block, place))
        case RedactedThinkingBlock():
            return _thought(_opened(block.data, f"{place}.data"))
        case ToolUseBlock():
            return FunctionCall(call_id=block.id, name=block.name, arguments=to_json(block.input).decode())
        case TextBlock():
            return _miscall(block.text) or Message(role="assistant", content=block.text)
    raise AssertionError(f"the policy says no block of type {block.type}")


def _thought(text: str) -> Reasoning:
    return Reasoning(summary=[], content=[TextPart(type="reasoning_text", text=text)])


def _checked(block: ThinkingBlock, place: str) -> str:
    """Return thinking as it was signed; what was signed elsewhere is taken as it is."""
    if not is_sealed(block.signature):
        return block.thinking
    text = _opened(block.signature, f"{place}.signature")
    if block.thinking not in ("", text):  # with `display: omitted`, only the signature has it
        raise _invalid(
            f"{place}.signature",
            "invalid `signature` in `thinking` block: the thinking was changed since it was signed",
        )
    return text


def _opened(sealed: str, place: str) -> str:
    try:
        return unseal(sealed)
    except ValueError as error:
        raise _invalid(place, f"this thinking cannot be read here: {error}; leave the block out") from error


def _invalid(place: str, message: str) -> PolicyError:
    return PolicyError(f"{place}: {message}", code="invalid_value", param=place)


def _miscall(text: str) -> FunctionCall | None:
    """Return the call behind a text that `block_of` wrote for one."""
    match = _MISCALL.fullmatch(text)
    if match is None or not is_own_id(match["id"]):
        return None
    return FunctionCall(call_id=match["id"], name=match["name"], arguments=match["arguments"])


def block_of(item: Item, *, shows_thinking: bool = True) -> dict[str, Any] | None:
    """Return the content block for a sampled item; None for a message that says nothing.

    The API carries a call's arguments as a JSON object. What the policy wrote instead, or what an object
    would lose, goes as text, from which the call is read again when the block comes back.

    Args:
        item: what was sampled.
        shows_thinking: whether thinking is written out; its signature has it in any case.
    """
    match item:
        case Reasoning():
            text = item.text
            return {
                "type": "thinking",
                "thinking": text if shows_thinking else "",
                "signature": seal(text),
            }
        case FunctionCall():
            arguments = tool_input(item.arguments)
            if arguments is None:
                said = (
                    f"[call {item.call_id} of {item.name} was not made: its arguments are no JSON object] "
                    f"{item.arguments}"
                )
                return {"type": "text", "text": said}
            return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": arguments}
        case Message():
            return {"type": "text", "text": item.text} if item.text else None
    raise AssertionError(f"a policy samples no {item.type}")


def tool_input(arguments: str) -> dict[str, Any] | None:
    """Return a call's arguments as an object that says all of what was written; None if there is none."""
    try:
        value = from_json(arguments, allow_inf_nan=False)
        again = json.dumps(value, allow_nan=False)
    except ValueError:
        return None
    if not isinstance(value, dict) or one_spelling(again) != one_spelling(arguments):
        return None
    return value
