"""Lark grammars in llguidance's dialect, written rule by rule."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = ["Grammar", "either", "json_rule", "literal", "token"]

_ANYTHING = "/(?s:.*)/"

_BLANKS = r"[ \t]{1,2}|\r?\n[ \t]{0,16}"
"""White space between JSON's words: none, on one line or indented; never so much that it goes on for ever."""


def literal(text: str) -> str:
    """Return an expression for a text; nothing for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def token(*token_ids: int) -> str:
    """Return an expression for one of several tokens."""
    return f"<[{','.join(map(str, sorted(token_ids)))}]>"


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return an expression for JSON that matches a schema."""
    # the key is ours: a schema from a request must not set how llguidance reads it
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _BLANKS}})


def either(alternatives: Iterable[str]) -> str:
    """Return an expression for one of several."""
    return "(" + " | ".join(alternatives) + ")"


class Grammar:
    """Collects the rules of a grammar.

    Args:
        spelled: marks that are no special tokens: free text may not spell them.
    """

    def __init__(self, spelled: Collection[str] = ()) -> None:
        self._spelled = sorted(set(spelled))
        self._names: dict[str, str] = {}
        self._lines = ["BLANK: /[ \\t\\r\\n]{1,4}/", f"TEXT: {_without(self._spelled)}"]

    def rule(self, body: str) -> str:
        """Add a rule and return its name; rules that say the same are one."""
        return self._add("r", body)

    def terminal(self, body: str) -> str:
        """Add a terminal and return its name."""
        return self._add("T", body)

    def until(self, mark: str) -> str:
        """Add a rule for free text up to and including a mark that is spelled; return its name."""
        others = [other for other in self._spelled if other not in mark]
        terminal = self.terminal(f"({_without(others)}) {literal(mark)}")
        return self._add("u", terminal, "[lazy]")

    def _add(self, kind: str, body: str, options: str = "") -> str:
        known = self._names.get(kind + body)
        if known is None:
            known = self._names[kind + body] = f"{kind}{len(self._names)}"
            self._lines.append(f"{known}{options}: {body}")
        return known

    def text(self, start: str) -> str:
        """Return the grammar whose generations `start` describes."""
        return "\n".join([f"start: {start}", *self._lines, ""])


def _without(marks: Collection[str]) -> str:
    """Return a terminal's body for any text that spells none of these."""
    if not marks:
        return _ANYTHING
    return f"{_ANYTHING} & ~({_ANYTHING} {either(map(literal, marks))} {_ANYTHING})"
