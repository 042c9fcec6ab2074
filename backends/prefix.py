"""The prefix rule: the next prompt extends what was sampled, or is a fork with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.memory import CallMemory, history_keys
from backends.rendering.chat import is_policy_item
from backends.rendering.renderer import Conversation, Renderer
from gym_sdk.schema import FunctionCall, Item, Message, Reasoning
from gym_sdk.tokens import CallTokens

__all__ = ["Prompt", "next_prompt"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The next prompt.

    Attributes:
        token_ids: what the engine is conditioned on.
        key: the key of the history it was made from.
        fork: why it does not extend the newest model call of the history; None if it does, or if there
            is no model call in the history.
    """

    token_ids: list[int]
    key: bytes
    fork: str | None = None


def next_prompt(conversation: Conversation, renderer: Renderer, memory: CallMemory) -> Prompt:
    """Make the next prompt by the prefix rule.

    If the tokens of a model call in the history are known and proven, the prompt is exactly that call's
    prompt and generation, followed by the rendering of everything after it. Known means that the items
    carry the token fields, or that the memory holds them; proven means that the call's prompt is what this
    history leads to and that its generation parses to the items that stand there. What is not proven is
    rendered anew, and reported as a fork.
    """
    keys = history_keys(conversation)
    items = conversation.items
    known: CallTokens | None = None
    end = 0
    fork: str | None = None
    carriers = _newest_first(items)
    for position in carriers:
        remembered = memory.recall(keys[position])
        sent = items[position - 1].tokens
        if remembered is not None and (sent is None or _same(sent, remembered)):
            known, end = remembered, position
            break
    for position in reversed(carriers):
        sent = items[position - 1].tokens
        if position <= end or sent is None:
            continue
        reason = _why_unproven(sent, position, known, end, conversation, renderer)
        if reason is not None:
            fork = f"the tokens on input[{position - 1}] are not proven: {reason}"
            break
        known, end = sent, position
        memory.remember(keys[position], sent)
    ids, why = _extend(known, end, conversation, renderer)
    has_calls = any(item.tokens is not None for item in items)
    return Prompt(ids, keys[len(items)], (fork or why) if known is not None or has_calls else None)


def _newest_first(items: Sequence[Item]) -> list[int]:
    """Return the positions after which a model call may have ended, newest first."""
    return [
        position
        for position in range(len(items), 0, -1)
        if items[position - 1].tokens is not None
        or (
            is_policy_item(items[position - 1])
            and (position == len(items) or not is_policy_item(items[position]))
        )
    ]


def _extend(
    known: CallTokens | None, end: int, conversation: Conversation, renderer: Renderer
) -> tuple[list[int], str | None]:
    """Return the prompt for the conversation, and why it does not extend `known`."""
    if known is None:
        return renderer.render(conversation), None
    bridge = renderer.bridge(known.token_ids, conversation, end)
    if bridge.token_ids is None:
        return renderer.render(conversation), bridge.reason
    return bridge.token_ids, None


def _why_unproven(
    sent: CallTokens,
    position: int,
    known: CallTokens | None,
    end: int,
    conversation: Conversation,
    renderer: Renderer,
) -> str | None:
    """Return why the sent tokens cannot be what this history sampled, or None if they are proven."""
    parsed = renderer.parse(sent.generation_token_ids).items
    start = position - len(parsed)
    if start < end or not _same_content(parsed, conversation.items[start:position]):
        return "the generation does not read as the items that stand there"
    before = Conversation(
        conversation.items[:start],
        conversation.tools,
        conversation.instructions,
        conversation.template_kwargs,
    )
    expected, _ = _extend(known, end, before, renderer)
    if expected != sent.prompt_token_ids:
        return "the history before it does not lead to its prompt"
    return None


def _same(sent: CallTokens, remembered: CallTokens) -> bool:
    return (
        sent.prompt_token_ids == remembered.prompt_token_ids
        and sent.generation_token_ids == remembered.generation_token_ids
    )


def _same_content(parsed: Sequence[Item], written: Sequence[Item]) -> bool:
    """Compare what a generation says with what stands in the history; ids do not matter."""
    return [_said(item) for item in parsed] == [_said(item) for item in written]


def _said(item: Item) -> tuple[str, ...]:
    if isinstance(item, Message | Reasoning):
        return (item.type, item.text)
    if isinstance(item, FunctionCall):
        return (item.type, item.name, item.arguments)
    return (item.type,)
