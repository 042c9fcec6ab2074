"""Sections that hold several calls, as DeepSeek and Kimi write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from backends.rendering.parsing.parts import Call, Part, Unparsed
from backends.rendering.parsing.pieces import Piece, text_of

__all__ = ["read_section"]


def read_section(
    section: Sequence[Piece],
    ends: str,
    call: tuple[str, str],
    read: Callable[[Sequence[Piece]], Call | None],
    *,
    partial: bool = False,
) -> Iterable[Part]:
    """Read a section of calls, its own marks included.

    A section without a single call stays text with its markup. Else the section's marks are dropped, and
    what is not a call stays text where it stands.

    Args:
        section: from the section's opening mark to its closing mark or the end.
        ends: the mark that closes the section.
        call: the marks that open and close a call.
        read: reads what stands between the two.
        partial: whether the section goes on: what is not closed is left out.
    """
    opener, closer = call
    pieces = section[1:-1] if section[-1].mark == ends else section[1:]
    parts: list[Part] = []
    index = 0
    while index < len(pieces):
        piece = pieces[index]
        if piece.mark != opener:
            parts.append(piece.text)
            index += 1
            continue
        end = index + 1
        while end < len(pieces) and pieces[end].mark not in (opener, closer):
            end += 1
        if partial and end == len(pieces):
            break
        found: Call | None = None
        if end < len(pieces) and pieces[end].mark == closer:
            found = read(pieces[index + 1 : end])
            end += 1
        parts.append(Unparsed(text_of(pieces[index:end])) if found is None else found)
        index = end
    if not any(isinstance(part, Call) for part in parts):
        if partial:
            return []
        attempts = sum(isinstance(part, Unparsed) for part in parts)
        return [Unparsed(text_of(section), max(1, attempts))]
    return parts
