"""Expressions for the values of arguments that are not written as one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from backends.constraints.alphabet import Alphabet
from backends.constraints.lark import Grammar, either, json_rule, literal
from backends.constraints.layout import Parameters

__all__ = ["DEFINITIONS", "NOTES", "Unsupported", "Until", "Values"]

NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
"""Keywords that constrain nothing."""
DEFINITIONS = ("$defs", "definitions")

_DEPTH = 8
"""How many references and unions are followed to find what a value may be."""
_SCALARS = ("null", "boolean", "integer", "number")
_PYTHON = ("'", "'")
_PYTHON_STRING = r"""/'([^'\\\x00-\x1f\x7f]|\\['"\\nrt])*'/"""
_SPOILS = re.compile(r"['\"\\\x00-\x1f\x7f]")
"""What cannot stand in a quoted string as it is."""

Until = Callable[[str], str]
"""Makes an expression for any text up to and including a mark."""


class Unsupported(ValueError):
    """A schema asks for what this format cannot be held to."""


class Values:
    """Writes expressions for values and what closes them.

    Strings that are written bare can be anything, or one of a list; all other values are JSON.

    Args:
        root: the schema of all arguments; it holds the definitions.
        layout: how values are written.
        grammar: takes the rules.
        alphabet: writes the layout's texts.
        until: makes an expression for bare text.
    """

    def __init__(
        self,
        root: Mapping[str, Any],
        layout: Parameters,
        grammar: Grammar,
        alphabet: Alphabet,
        until: Until,
    ) -> None:
        self._root = root
        self._layout = layout
        self._grammar = grammar
        self._alphabet = alphabet
        self._until = until

    def expression(self, schema: Any) -> str:
        """Return an expression for a value that matches a schema.

        Raises:
            Unsupported: the schema cannot be followed here.
        """
        if self._layout.quotes is not None:
            return self._quoted(schema, self._layout.quotes)
        if self._layout.value_end:
            return self._bare(schema, self._layout.value_end)
        return self._grammar.rule(self._json(schema))

    def _quoted(self, schema: Any, quotes: tuple[str, str]) -> str:
        """Return an expression for a value whose strings stand between quotes that are not JSON's."""
        opening, closing = map(self._alphabet.expression, quotes)
        options: list[str] = []
        for kind in _branches(schema, self._root):
            words = _listed(kind)
            if _is_any_string(kind):
                python = quotes == _PYTHON and self._grammar.terminal(_PYTHON_STRING)
                options.append(python or f"{opening} {self._until(quotes[1])}")
            elif words and not any(map(_SPOILS.search, words)):
                options += [f"{opening} {literal(word)} {closing}" for word in words]
            # the parsers read JSON's own strings as well
            if quotes == _PYTHON or not (_is_any_string(kind) or words):
                options.append(self._json(kind))
        return self._grammar.rule(either(options))

    def _bare(self, schema: Any, end: str) -> str:
        """Return an expression for a value whose strings are written as they are."""
        kinds = list(_branches(schema, self._root))
        others = [kind for kind in kinds if not _is_string(kind)]
        words = [word for kind in kinds for word in self._words(kind, alone=not others)]
        if any(map(_is_any_string, kinds)):
            if not all(kind.keys() == {"type"} and kind["type"] in _SCALARS for kind in others):
                raise Unsupported(
                    "this model writes strings bare: text could be read as the other types here"
                )
            return self._until(end.lstrip())
        options = [literal(word) for word in words] + [self._json(kind) for kind in others]
        return self._grammar.rule(f"{either(options)} {self._alphabet.expression(end)}")

    def _words(self, kind: Mapping[str, Any], *, alone: bool) -> list[str]:
        """Return the texts that a string's schema lists; `alone`: the value can be nothing but a string."""
        if not _is_string(kind) or _is_any_string(kind):
            return []
        words = _listed(kind)
        if words is None:
            keyword = sorted(kind.keys() - {"type"})[0]
            raise Unsupported(f"this model writes strings bare, which cannot be held to {keyword!r}")
        end = self._layout.value_end.strip()
        for word in words:
            if not word or word != word.strip() or end in word or (not alone and _reads_otherwise(word)):
                raise Unsupported(f"this model writes strings bare: {word!r} would be read as something else")
        return words

    def _json(self, schema: Any) -> str:
        if not isinstance(schema, Mapping):
            schema = {}
        definitions = {key: self._root[key] for key in DEFINITIONS if key in self._root}
        return json_rule({**schema, **definitions})


def _branches(schema: Any, root: Mapping[str, Any], depth: int = _DEPTH) -> Iterator[Mapping[str, Any]]:
    """Yield the alternatives of a value's schema, each of one type where the schema says types."""
    said = schema if isinstance(schema, Mapping) else {}
    rest = {key: value for key, value in said.items() if key not in NOTES}
    reference, union, kinds = rest.get("$ref"), rest.get("anyOf"), rest.get("type")
    if depth and isinstance(reference, str) and len(rest) == 1:
        yield from _branches(_resolve(reference, root), root, depth - 1)
    elif depth and isinstance(union, list) and len(rest) == 1:
        for branch in union:
            yield from _branches(branch, root, depth - 1)
    elif isinstance(kinds, list):
        for kind in kinds:
            yield {**rest, "type": kind}
    else:
        yield rest


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise Unsupported(f"{reference!r} cannot be followed")
    return found


def _is_string(kind: Mapping[str, Any]) -> bool:
    if "enum" in kind or "const" in kind:
        return all(isinstance(value, str) for value in kind.get("enum", [kind.get("const")]))
    return kind.get("type") == "string"


def _is_any_string(kind: Mapping[str, Any]) -> bool:
    return kind == {"type": "string"}


def _listed(kind: Mapping[str, Any]) -> list[str] | None:
    """Return the strings that a schema lists; None if it does not, or says more about them."""
    if (
        not _is_string(kind)
        or kind.keys() - {"type", "enum", "const"}
        or len(kind.keys() & {"enum", "const"}) != 1
    ):
        return None
    return list(kind.get("enum", [kind.get("const")]))


def _reads_otherwise(word: str) -> bool:
    """Whether a text that may be a string or something else would be read as something else."""
    try:
        json.loads(word)
    except ValueError:
        return word in ("True", "False", "None")
    return True
