"""The new items of a conversation, rendered behind an assistant turn that stands for the sampled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from backends.rendering.attribution import Marks, Span
from backends.rendering.chat import chat_messages, texts_of
from backends.rendering.neutral import earlier_calls, neutral_turn, unused_words
from backends.rendering.renderer import Conversation
from backends.rendering.tail import Tail, TurnEnds
from gym_sdk.errors import PolicyError

__all__ = ["Apply", "Messages", "NewItems"]

Messages: TypeAlias = list[dict[str, Any]]
Apply: TypeAlias = Callable[[Messages, bool], str]
"""Renders messages, with or without a generation prompt."""


class NewItems:
    """The items of a conversation from `start` on.

    Args:
        conversation: the whole conversation.
        start: index of the first new item.
        apply: the chat template, with the conversation's tools and settings.
        calls: whether the template renders calls.
    """

    def __init__(self, conversation: Conversation, start: int, apply: Apply, *, calls: bool) -> None:
        self._conversation = conversation
        self._start = start
        self._apply = apply
        self._calls = calls
        self._items = conversation.items[start:]
        self._names = {call.call_id: call.name for call in earlier_calls(conversation, start)}
        self.messages: Messages = chat_messages(self._items, first=start, names=self._names)
        self.words = unused_words(texts_of(self.messages))

    def turn(self, word: str) -> dict[str, Any]:
        """Return an assistant message that may stand before the new items and ends with `word`."""
        return neutral_turn(self._conversation, self._start, word, calls=self._calls)

    def tail(self, ends: TurnEnds, before: Messages, word: str) -> Tail:
        """Return what follows the assistant turn.

        Args:
            ends: how the template ends turns.
            before: what stands before the turn.
            word: what the turn says.

        Raises:
            PolicyError: the template refuses the messages, or the end of the turn can't be told.
        """
        turn = self.turn(word)
        return self._cut(ends, self._apply([*before, turn, *self.messages], True), before, turn, word)

    def marked_tail(self, ends: TurnEnds, before: Messages, word: str) -> tuple[Tail, Sequence[Span]] | None:
        """Return what follows the assistant turn and where the items' texts stand, counted from its end.

        None if it can't be told with marks in the texts.
        """
        messages = chat_messages(self._items, first=self._start, names=self._names, wrap=Marks.wrap)
        turn = self.turn(word)
        try:
            text, spans = Marks.read(self._apply([*before, turn, *messages], True))
            tail = self._cut(ends, text, before, turn, word)
        except PolicyError:
            return None
        return tail, [span.moved(-len(text)) for span in spans]

    def _cut(self, ends: TurnEnds, text: str, before: Messages, turn: dict[str, Any], word: str) -> Tail:
        found = ends.find(
            text,
            word,
            calls="tool_calls" in turn,
            next_role=self.messages[0]["role"] if self.messages else "",
            alone=lambda: self._apply([*before, turn], False),
        )
        if isinstance(found, str):
            raise PolicyError(found)
        return found
