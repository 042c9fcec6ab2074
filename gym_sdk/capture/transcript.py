"""Model calls into one list of items.

The items are the first call's input; then, for each call in order of arrival, what its input adds to the
conversation that it continues, and its output. A call continues the conversation that holds most of its input
in the same order; items are compared by what they say, not by their ids. So an agent may drop reasoning
items, edit or shorten its history: only what was not there before is added.

System text comes where a conversation begins, and again where it changes (a hand-off), as a system message:
both `instructions` and the leading system messages of the input. What only repeats the task's own
`instructions` is left out, as in the rollouts of `client.rollout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic_core import from_json, to_json

from gym_sdk.capture.calls import CapturedCall
from gym_sdk.schema import (
    FunctionCall,
    FunctionCallOutput,
    Item,
    Message,
    ModelCall,
    Reasoning,
    Task,
)
from gym_sdk.tokens import CallTokens

__all__ = ["Transcript", "write_transcript"]

_Key: TypeAlias = tuple[Any, ...]


@dataclass(slots=True)
class Transcript:
    """The items of a captured rollout.

    Attributes:
        items: all items in order, without token fields.
        input_items: how many of them are the first call's input.
        model_calls: the calls that generated something.
        silent_forks: calls that continue a conversation with a prompt that does not extend it, without the
            server having noticed.
    """

    items: list[Item] = field(default_factory=list)
    input_items: int = 0
    model_calls: list[ModelCall] = field(default_factory=list)
    silent_forks: int = 0


@dataclass(slots=True)
class _Conversation:
    """The newest history of a conversation."""

    head: list[_Key]
    body: list[_Key]
    sampled: frozenset[int]
    """Positions in `body` that the policy wrote."""


def write_transcript(calls: Sequence[CapturedCall], task: Task) -> Transcript:
    """Write the transcript of calls in order of arrival."""
    transcript = Transcript()
    conversations: list[_Conversation] = []
    tokens: list[CallTokens] = []
    for index, call in enumerate(calls):
        _add(call, task, transcript, conversations, tokens)
        if index == 0:
            transcript.input_items = len(transcript.items)
        if call.response_id is not None:
            _add_output(call, transcript)
        if call.tokens is not None:
            tokens.append(call.tokens)
    return transcript


def _add(
    call: CapturedCall,
    task: Task,
    transcript: Transcript,
    conversations: list[_Conversation],
    tokens: list[CallTokens],
) -> None:
    head, body = _split(call)
    keys = [_key(item) for item in body]
    head_keys = [_key(item) for item in head]
    base, found = _continued(keys, conversations)
    matched = set(found)
    known_head = [("message", "system", task.instructions)] if task.instructions else []
    if head_keys != (base.head if base is not None else known_head):
        transcript.items += head
    transcript.items += [item for position, item in enumerate(body) if position not in matched]
    sampled = {position for position in matched if base is not None and found[position] in base.sampled}
    if sampled and call.tokens is not None and call.fork is None and not _extends(call.tokens, tokens):
        transcript.silent_forks += 1
    if base is not None and _is_whole(base, set(found.values())):
        conversations.remove(base)
    start = len(keys)
    keys += [_key(item) for item in call.output]
    sampled |= set(range(start, len(keys)))
    conversations.append(_Conversation(head_keys, keys, frozenset(sampled)))


def _add_output(call: CapturedCall, transcript: Transcript) -> None:
    first = len(transcript.items)
    transcript.items += call.output
    transcript.model_calls.append(
        ModelCall(
            response_id=call.response_id or "",
            first_item=first,
            end_item=len(transcript.items),
            status=call.status,
            tokens=call.tokens,
            duration_s=call.duration_s,
        )
    )


def _split(call: CapturedCall) -> tuple[list[Item], list[Item]]:
    """Split a call's input into the system text at its front, and the rest."""
    head: list[Item] = []
    if call.instructions:
        head.append(Message(role="system", content=call.instructions))
    for position, item in enumerate(call.input):
        if not (isinstance(item, Message) and item.role in ("system", "developer")):
            # Some agents send reasoning back without its text: that says nothing.
            rest = call.input[position:]
            return head, [entry for entry in rest if not isinstance(entry, Reasoning) or entry.text]
        head.append(item)
    return head, []


def _continued(
    keys: list[_Key], conversations: Sequence[_Conversation]
) -> tuple[_Conversation | None, dict[int, int]]:
    """Find the conversation that holds most of the input; return it and where it holds which item."""
    best: _Conversation | None = None
    found: dict[int, int] = {}
    for conversation in reversed(conversations):
        matched = _in_order(keys, conversation.body)
        if len(matched) > len(found):
            best, found = conversation, matched
            if len(found) == len(keys):
                break
    return best, found


def _in_order(keys: list[_Key], body: list[_Key]) -> dict[int, int]:
    """Map positions in `keys` to positions in `body` that say the same, both growing."""
    found: dict[int, int] = {}
    start = 0
    for position, key in enumerate(keys):
        try:
            place = body.index(key, start)
        except ValueError:
            continue
        found[position] = place
        start = place + 1
    return found


def _is_whole(conversation: _Conversation, places: set[int]) -> bool:
    """Whether the input holds all of the conversation, but for reasoning that the agent dropped."""
    return all(place in places or key[0] == "reasoning" for place, key in enumerate(conversation.body))


def _extends(tokens: CallTokens, earlier: Sequence[CallTokens]) -> bool:
    if tokens.parent is not None:
        return True
    prompt = tokens.prompt_token_ids
    return any(prompt[: len(call.token_ids)] == call.token_ids for call in reversed(earlier))


def _key(item: Item) -> _Key:
    """Return what an item says."""
    if isinstance(item, Message):
        role = "system" if item.role == "developer" else item.role
        return ("message", role, item.text)
    if isinstance(item, FunctionCall):
        return ("function_call", item.call_id, item.name, _canonical(item.arguments))
    if isinstance(item, FunctionCallOutput):
        return ("function_call_output", item.call_id, item.text)
    if isinstance(item, Reasoning):
        return ("reasoning", item.text)
    wire = {name: value for name, value in item.to_wire().items() if name not in ("id", "status")}
    return ("other", to_json(wire))


def _canonical(arguments: str) -> Any:
    """Some agents write the arguments' JSON anew; that is still the same call."""
    try:
        return to_json(from_json(arguments))
    except ValueError:
        return arguments
