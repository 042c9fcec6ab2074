"""Which stretch of a rendered text comes from which item: marks that are put in and taken out again."""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Header", "Marks", "Span", "owners_of"]

_DIGITS = {str(digit): chr(0xE010 + digit) for digit in range(10)}
_BACK = {mark: digit for digit, mark in _DIGITS.items()}
# Drawn for each process, so that nobody can write a mark into a message.
_SECRET = "".join(_DIGITS[secrets.choice("0123456789")] for _ in range(20))
_OPEN, _END, _CLOSE = f"\ue000{_SECRET}", "\ue002", f"\ue001{_SECRET}"
_MARK = re.compile(f"{_OPEN}([\ue010-\ue019]+){_END}|{_CLOSE}")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start <= i < end` of a text come from the item at index `item`."""

    start: int
    end: int
    item: int

    def moved(self, by: int) -> Span:
        """Return the same span, `by` characters later."""
        return Span(self.start + by, self.end + by, self.item)


@dataclass(frozen=True, slots=True)
class Header:
    """What opens a user message: how many special tokens, and whether they follow one that closes a turn."""

    size: int = 1
    after_closing: bool = True


class Marks:
    """Wraps the texts of items in private-use characters before they go into a chat template."""

    @staticmethod
    def wrap(item: int, text: str) -> str:
        """Mark a text, inside its surrounding white space, which templates like to strip."""
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        number = "".join(_DIGITS[digit] for digit in str(item))
        return f"{text[:start]}{_OPEN}{number}{_END}{core}{_CLOSE}{text[start + len(core) :]}"

    @staticmethod
    def read(marked: str) -> tuple[str, list[Span]]:
        """Take the marks out; return the text without them and where each item's texts stand in it."""
        pieces: list[str] = []
        spans: list[Span] = []
        length = start = 0
        opened: tuple[int, int] | None = None
        for match in _MARK.finditer(marked):
            piece = marked[start : match.start()]
            pieces.append(piece)
            length += len(piece)
            start = match.end()
            if match.group(1):
                opened = (int("".join(_BACK[mark] for mark in match.group(1))), length)
            elif opened is not None:
                spans.append(Span(opened[1], length, opened[0]))
                opened = None
        pieces.append(marked[start:])
        return "".join(pieces), spans


def owners_of(
    spans: Sequence[Span],
    special: Sequence[tuple[int, int]],
    offsets: Sequence[tuple[int, int]],
    header: Header,
) -> list[int]:
    """Return the owning item of each token, -1 for what no item owns.

    What stands between two items is the first one's up to and including the first special token there, which
    closes its turn or its markup; then it is the second one's: its header. Where nothing closes turns, that
    token is the second one's as well. What stands before the first item, its header apart, is nobody's.

    Args:
        spans: where the items' texts stand, by `Marks.read`.
        special: start and end of each special token of the text, in order.
        offsets: start and end of each token in the text.
        header: what opens a user message.
    """
    changes: list[tuple[int, int]] = [(0, -1)]
    position, owner = 0, -1
    edge = 1 if header.after_closing else 0
    begins = [begin for begin, _ in special]
    for span in sorted(spans, key=lambda span: span.start):
        if span.item != owner:
            between = special[bisect_left(begins, position) : bisect_left(begins, span.start)]
            if owner == -1:
                at = len(between) - header.size - edge
                change = between[at][edge] if at >= 0 else position
            else:
                change = between[0][edge] if between else position
            changes.append((change, span.item))
            owner = span.item
        position = max(position, span.end)
    last = special[bisect_left(begins, position) :]
    if last and owner != -1:
        changes.append((last[0][edge], -1))
    starts = [start for start, _ in changes]
    return [changes[bisect_right(starts, start) - 1][1] for start, _ in offsets]
