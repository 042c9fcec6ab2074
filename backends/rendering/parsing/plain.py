"""No calls: text and thinking."""

from __future__ import annotations

from backends.rendering.parsing.markup import MarkupParser

__all__ = ["PlainParser"]


class PlainParser(MarkupParser):
    """Parses `<think>…</think>`; everything else is text."""

    name = "none"
