"""Arguments that a format writes without types, as JSON text by the function's schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from backends.rendering.parsing.json_text import json_text
from gym_sdk.schema import FunctionTool

__all__ = ["typed_arguments"]

_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""Policies that write Python more than JSON write these."""


def typed_arguments(name: str, written: Iterable[tuple[str, str]], tools: Sequence[FunctionTool]) -> str:
    """Return the JSON text of arguments.

    A parameter that the schema calls a string is taken as it stands. Any other is JSON where it parses (and,
    if it may also be a string, where it parses as one of the other types), else a string. What is JSON is not
    written anew, so that numbers and duplicates stay as they were sampled.

    Args:
        name: the function's name.
        written: the parameters and their text, in order.
        tools: the functions on offer.
    """
    schema = next((tool.parameters for tool in tools if tool.name == name), None) or {}
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        properties = {}
    members = [
        f"{json_text(key)}: {_typed(text, _types(properties.get(key), schema))}" for key, text in written
    ]
    return "{" + ", ".join(members) + "}"


def _typed(text: str, types: frozenset[str]) -> str:
    """Return a parameter's JSON text; no types: the schema does not say."""
    if types == {"string"}:
        return json_text(text)
    bare = text.strip()
    bare = _PYTHON.get(bare, bare) if types else bare
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json_text(text)
    if "string" in types and _type_of(value) not in types and not (type(value) is int and "number" in types):
        return json_text(text)
    return bare


def _types(schema: Any, root: Mapping[str, Any], depth: int = 4) -> frozenset[str]:
    """Return the JSON types that a parameter's schema allows; none if it does not say."""
    if not isinstance(schema, Mapping) or depth == 0:
        return frozenset()
    types: set[str] = set()
    declared = schema.get("type")
    if isinstance(declared, str):
        types.add(declared)
    elif isinstance(declared, list):
        types.update(kind for kind in declared if isinstance(kind, str))
    for union in ("anyOf", "oneOf"):
        branches = schema.get(union)
        for branch in branches if isinstance(branches, list) else ():
            types |= _types(branch, root, depth - 1)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        types |= _types(_resolve(reference, root), root, depth - 1)
    if not types and ("enum" in schema or "const" in schema):
        choices = schema.get("enum", [schema.get("const")])
        types.update(_type_of(choice) for choice in (choices if isinstance(choices, list) else ()))
    return frozenset(types)


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """Follow a reference within the schema, such as `#/$defs/Unit`."""
    found: Any = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _type_of(value: Any) -> str:
    for kind, name in _JSON_TYPES:
        if isinstance(value, kind):
            return name
    return "null"


_JSON_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
