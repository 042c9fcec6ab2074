"""Where in a text the thinking stands that SGLang's reasoning parsers found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Stretch", "placed"]

_MARK = re.compile(
    r"\s+|(?: to=self)?<[^<>\s]{1,60}>(?:assistant|analysis|commentary|final|thought)?(?: to=self)?"
    r"|\[/?[A-Z_]{3,20}\]|\u25c1[^\u25b7]{1,20}\u25b7"
)
"""Blanks, and how the field spells the marks around thinking and answers."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a text.

    Attributes:
        thought: whether it is thinking.
        text: what it says, without marks.
        start: where it begins in the text, the marks before it included.
        end: where the next one begins.
    """

    thought: bool
    text: str
    start: int
    end: int


def placed(blocks: Sequence[tuple[bool, str]], sent: str, opener: str | None) -> list[Stretch]:
    """Place an answer's blocks in the text that was sent, so that nothing gets lost.

    What the parser took away has to be marks; the rest of it stays text. If a block is not in the text, or
    not in this order, the parser wrote the text anew, and all of it stays text.

    Args:
        blocks: whether each is thinking, and what it says.
        sent: the text that the parser was given.
        opener: the mark that opens thinking, if it is known.
    """
    if not blocks and opener is not None and sent.startswith(opener) and not _says(sent):
        return [Stretch(True, "", 0, len(sent))]
    found: list[Stretch] = []
    end = 0
    for thought, said in blocks:
        start = _find(said, sent, end)
        if start is None:
            return [Stretch(False, sent, 0, len(sent))]
        gap = sent[end:start]
        if not thought and not found and opener is not None and gap.lstrip().startswith(opener):
            found.append(Stretch(True, "", 0, start))  # thinking without a word
        elif _says(gap):
            found.append(Stretch(False, gap, end, start))
        found.append(Stretch(thought, said, end, start + len(said)))
        end = start + len(said)
    if _says(sent[end:]):
        found.append(Stretch(False, sent[end:], end, len(sent)))
    elif found:  # the closing mark
        last = found.pop()
        found.append(Stretch(last.thought, last.text, last.start, len(sent)))
    return _with_closers(found)


def _with_closers(found: Sequence[Stretch]) -> list[Stretch]:
    """Return the stretches with the marks between two counted for the thinking before them."""
    stretches: list[Stretch] = []
    for index, one in enumerate(found):
        following = found[index + 1] if index + 1 < len(found) else None
        end = one.end
        if one.thought and following is not None and not following.thought:
            end = max(end, following.end - len(following.text))
        stretches.append(Stretch(one.thought, one.text, one.start, end))
    return stretches


def _find(said: str, sent: str, start: int) -> int | None:
    """Return where a block stands: behind marks if it can, as it may say what a mark says."""
    position = start
    while not sent.startswith(said, position):
        mark = _MARK.match(sent, position)
        if mark is None:
            position = sent.find(said, start)
            return position if position >= 0 else None
        position = mark.end()
    return position


def _says(gap: str) -> bool:
    """Whether there is more than marks."""
    return bool(_MARK.sub("", gap).strip())
