"""Which special tokens end and open the turns of a chat template, found out by trying."""

from __future__ import annotations

from typing import Any

from backends.rendering.attribution import Header
from backends.rendering.chat_template import ChatTemplate
from backends.rendering.special import SpecialTokens
from backends.rendering.tail import TurnEnds
from gym_sdk.errors import PolicyError

__all__ = ["closing_ids", "header_of", "opens_next"]

_WORD = "qzv"
_USER: dict[str, Any] = {"role": "user", "content": "."}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": _WORD}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "q", "type": "function", "function": {"name": "f", "arguments": {"a": _WORD}}}],
}
_OUTPUT: dict[str, Any] = {"role": "tool", "tool_call_id": "q", "name": "f", "content": "."}


def opens_next(template: ChatTemplate, special: SpecialTokens) -> bool:
    """Whether the template puts no special token after the last turn of a conversation."""
    try:
        text = template.render([_USER, _ANSWER])
    except PolicyError:
        return False
    return not special.occur_in(text[text.rfind(_WORD) :])


def header_of(template: ChatTemplate, special: SpecialTokens) -> Header:
    """Return what opens a user message."""
    try:
        alone = template.render([_USER, _ANSWER])
        text = template.render([_USER, _ANSWER, {"role": "user", "content": "xwk"}])
    except PolicyError:
        return Header()
    closing = special.spans(alone[alone.rfind(_WORD) :])
    between = special.spans(text[text.rfind(_WORD) : text.rfind("xwk")])
    return Header(max(1, len(between) - len(closing)), bool(closing))


def closing_ids(template: ChatTemplate, ends: TurnEnds, special: SpecialTokens) -> frozenset[int]:
    """Return the tokens that close the last turn of a conversation, with and without a call."""
    turns = [(_ANSWER, _USER)]
    if template.abilities.calls:
        turns.append((_CALL, _OUTPUT if template.abilities.outputs else _USER))
    closing: set[int] = set()
    for turn, follower in turns:
        try:
            alone = template.render([_USER, turn])
            full = template.render([_USER, turn, follower], generation_prompt=True)
        except PolicyError:
            continue
        tokens = ends.closing_tokens(full, alone, _WORD, calls=turn is _CALL)
        tokens = tokens or ends.opening_tokens(full, alone)
        closing |= {special.ids[token] for token in tokens}
    return frozenset(closing)
