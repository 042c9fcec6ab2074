"""Expressions for the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.constraints.alphabet import Alphabet
from backends.constraints.lark import Grammar, either, json_rule
from backends.constraints.layout import Parameters
from backends.constraints.values import DEFINITIONS, NOTES, Unsupported, Until, Values

__all__ = ["arguments", "object_schema"]

_EMPTY: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_OBJECT = frozenset({"type", "properties", "required", "additionalProperties", "$schema", *DEFINITIONS})
"""Keywords of an object that parameters written one by one can keep to."""


def object_schema(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the schema of a function's arguments, which are an object; without parameters, an empty one.

    Raises:
        Unsupported: the schema describes something else.
    """
    if parameters and parameters.get("type", "object") != "object":
        raise Unsupported(f"arguments are an object, not {parameters['type']!r}")
    said = {key: value for key, value in (parameters or {}).items() if key not in NOTES}
    if not said.get("properties"):
        said.pop("properties", None)
    return _EMPTY if said.keys() <= {"type"} else {"type": "object", **said}


def arguments(
    schema: Mapping[str, Any], layout: Parameters | None, grammar: Grammar, alphabet: Alphabet, until: Until
) -> str:
    """Return an expression for the arguments that match a schema.

    Args:
        schema: of the arguments; see `object_schema`.
        layout: how they are written; None: as a JSON object.
        grammar: takes the rules that this needs.
        alphabet: writes the layout's texts.
        until: makes an expression for bare text.

    Raises:
        Unsupported: the schema cannot be followed in this layout.
    """
    if layout is None:
        return grammar.rule(json_rule(schema))
    unknown = sorted(schema.keys() - _OBJECT - NOTES)
    if unknown:
        raise Unsupported(
            f"this model writes arguments one by one, and {unknown[0]!r} constrains them together"
        )
    values = Values(schema, layout, grammar, alphabet, until)
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = frozenset(schema.get("required", ()))
    names = [name for name in properties if properties[name] is not False]
    names += sorted(required - properties.keys())
    if layout.ordered:
        names.sort()
    expressions = {name: values.expression(properties.get(name, True)) for name in names}
    return _one_by_one(expressions, required, layout, grammar, alphabet)


def _one_by_one(
    values: Mapping[str, str],
    required: frozenset[str],
    layout: Parameters,
    grammar: Grammar,
    alphabet: Alphabet,
) -> str:
    """Return an expression for parameters in order; those that are not required may be left out.

    It is built from the last one to the first: `following` is what may stand after a value.
    """
    last = alphabet.expression(layout.last)
    following = grammar.rule(last) if last else ""
    starts: list[str] = []
    for name, value in reversed(list(values.items())):
        start = alphabet.expression(f"{layout.first}{name}{layout.naming}")
        later = alphabet.expression(f"{layout.between}{name}{layout.naming}")
        if name in required:
            starts = [f"{start} {value} {following}"]
            following = grammar.rule(f"{later} {value} {following}")
        else:
            starts.append(f"{start} {value} {following}")
            skipped = f"| {following}" if following else ""
            following = grammar.rule(f"({later} {value} {following} {skipped})" + ("" if skipped else "?"))
    if required:
        return either(starts)
    return f"{either(starts)}?" if starts else ""
