"""Snapshots of a response, one after the other, as the changes between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from backends.snapshots import Snapshot
from gym_sdk.schema import (
    CustomToolCall,
    FunctionCall,
    Item,
    Message,
    OutputText,
    Reasoning,
    TextPart,
)

__all__ = [
    "ArgumentsGrown",
    "Change",
    "ItemBegun",
    "ItemEnded",
    "PartBegun",
    "PartEnded",
    "TextGrown",
    "Unfolding",
    "arguments_of",
]

_log = logging.getLogger(__name__)

Text: TypeAlias = OutputText | TextPart


@dataclass(frozen=True, slots=True)
class ItemBegun:
    """An item is there; its texts are still empty."""

    index: int
    item: Item


@dataclass(frozen=True, slots=True)
class PartBegun:
    """A part of an item's content is there; its text is still empty."""

    index: int
    item: Item
    part_index: int
    part: Text


@dataclass(frozen=True, slots=True)
class TextGrown:
    """A part's text has become longer; `log_probs` are those of the tokens that are new."""

    index: int
    item: Item
    part_index: int
    part: Text
    delta: str
    log_probs: Sequence[Any]


@dataclass(frozen=True, slots=True)
class PartEnded:
    """A part's text is whole."""

    index: int
    item: Item
    part_index: int
    part: Text


@dataclass(frozen=True, slots=True)
class ArgumentsGrown:
    """The arguments of a call, or the input of a custom tool's, have become longer."""

    index: int
    item: FunctionCall | CustomToolCall
    delta: str


@dataclass(frozen=True, slots=True)
class ItemEnded:
    """An item is whole."""

    index: int
    item: Item


Change: TypeAlias = ItemBegun | PartBegun | TextGrown | PartEnded | ArgumentsGrown | ItemEnded


class Unfolding:
    """Tells what is new in each snapshot. Applied one after the other, the changes build the last one."""

    def __init__(self) -> None:
        self._at = 0
        self._begun = False
        self._texts: dict[int, str] = {}
        self._scored: dict[int, int] = {}

    def take(self, snapshot: Snapshot) -> Iterator[Change]:
        """Yield the changes since the last snapshot."""
        items = snapshot.items
        while self._at < len(items):
            index, item = self._at, items[self._at]
            grows = snapshot.open and index == len(items) - 1
            if not self._begun:
                self._begun = True
                yield ItemBegun(index, item)
            if isinstance(item, FunctionCall | CustomToolCall):
                if not grows:
                    yield ArgumentsGrown(index, item, arguments_of(item))
            else:
                yield from self._parts(index, item, grows)
            if grows:
                return
            yield ItemEnded(index, item)
            self._at += 1
            self._begun = False
            self._texts.clear()
            self._scored.clear()

    def _parts(self, index: int, item: Item, grows: bool) -> Iterator[Change]:
        parts = _text_parts(item)
        last = max(parts, default=0)
        for number, part in parts.items():
            if number < max(self._texts, default=0):
                continue  # it has ended
            if number not in self._texts:
                self._texts[number] = ""
                yield PartBegun(index, item, number, part)
            known = self._texts[number]
            scored = (part.logprobs or ()) if isinstance(part, OutputText) else ()
            entries = scored[self._scored.get(number, 0) :]
            if not part.text.startswith(known):
                _log.error("a text that was streamed was read otherwise in the end: item %d", index)
            elif len(part.text) > len(known) or entries:
                self._texts[number] = part.text
                self._scored[number] = self._scored.get(number, 0) + len(entries)
                yield TextGrown(index, item, number, part, part.text[len(known) :], entries)
            if not grows or number < last:
                yield PartEnded(index, item, number, part)


def arguments_of(item: FunctionCall | CustomToolCall) -> str:
    """Return what a call is called with."""
    return item.arguments if isinstance(item, FunctionCall) else item.input


def _text_parts(item: Item) -> Mapping[int, Text]:
    if not isinstance(item, Message | Reasoning) or not isinstance(item.content, list):
        return {}
    return {
        number: part for number, part in enumerate(item.content) if isinstance(part, OutputText | TextPart)
    }
