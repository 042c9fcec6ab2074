"""Schemas of answers, where a parser could take the answer for a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.constraints.values import Unsupported
from backends.rendering.parsing import Parser
from backends.rendering.parsing.llama3_json import Llama3JsonParser

__all__ = ["answer_schema"]

_CALL = ({"name", "parameters"}, {"name", "arguments"})
"""Members that make an object a call, in the formats whose calls are bare JSON."""


def answer_schema(schema: Mapping[str, Any], parser: Parser) -> Mapping[str, Any]:
    """Return the schema, narrowed so that no answer reads as a call.

    Raises:
        Unsupported: it cannot be narrowed so.
    """
    if not isinstance(parser, Llama3JsonParser):
        return schema
    kind = schema.get("type")
    if isinstance(kind, str) and kind != "object":
        return schema
    properties = schema.get("properties")
    if kind != "object" or not properties or any(members <= properties.keys() for members in _CALL):
        raise Unsupported(
            "this model writes calls as bare JSON: an answer needs a schema of type `object` that lists its "
            "properties, and cannot have both `name` and `parameters` or `arguments`"
        )
    return {**schema, "additionalProperties": False}
