"""JSON schemas in the form that OpenAI's strict mode accepts.

The rules (OpenAI, "Structured Outputs: supported schemas"): every object closed, with all of its properties
required; no free-form objects, tuples or untyped values; a limited set of keywords; `anyOf` but not `oneOf`;
nothing beside a `$ref`. What was optional becomes nullable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic_core import to_json

__all__ = ["NotStrictError", "accepts_null", "resolve", "strict_schema", "without_titles"]

Schema = dict[str, Any]

_MAPS = ("properties", "$defs", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "contains", "propertyNames")
_ANNOTATIONS = ("examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator", "$schema")
_IMPOSSIBLE = (
    "allOf",
    "not",
    "if",
    "then",
    "else",
    "prefixItems",
    "contains",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedProperties",
)
_KEYWORDS = frozenset(
    {
        "$defs",
        "$ref",
        "additionalProperties",
        "anyOf",
        "const",
        "description",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maximum",
        "minItems",
        "minimum",
        "multipleOf",
        "pattern",
        "properties",
        "required",
        "type",
    }
)
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
_LOOK_AROUND = re.compile(r"\(\?<?[=!]")
_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class NotStrictError(ValueError):
    """A schema has no strict form."""


def map_subschemas(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """Return a copy whose direct subschemas went through `change`."""
    result = dict(schema)
    for key in _MAPS:
        if isinstance(result.get(key), dict):
            result[key] = {name: _changed(child, change) for name, child in result[key].items()}
    for key in _LISTS:
        if isinstance(result.get(key), list):
            result[key] = [_changed(child, change) for child in result[key]]
    for key in _SINGLE:
        if key in result:
            result[key] = _changed(result[key], change)
    return result


def _changed(child: Any, change: Callable[[Schema], Schema]) -> Any:
    return change(child) if isinstance(child, dict) else child


def without_titles(schema: Schema) -> Schema:
    """Return the schema without pydantic's titles, which repeat the names."""
    result = map_subschemas(schema, without_titles)
    if isinstance(result.get("title"), str):
        del result["title"]
    return result


def resolve(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow `$ref`s into `$defs`."""
    while isinstance(schema.get("$ref"), str):
        schema = defs[schema["$ref"].removeprefix("#/$defs/")]
    return schema


def accepts_null(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> bool:
    """Whether null is valid under the schema."""
    schema = resolve(schema, defs)
    kind = schema.get("type")
    if kind == "null" or (isinstance(kind, list) and "null" in kind):
        return True
    if "const" in schema:
        return schema["const"] is None
    if "enum" in schema:
        return None in schema["enum"]
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return any(accepts_null(branch, defs) for branch in branches)
    return kind is None and "allOf" not in schema


def strict_schema(schema: Schema) -> Schema:
    """Return the strict form of an object schema.

    Optional properties become required and nullable, and their description says what null stands for;
    constraints that strict mode does not know move into the description.

    Raises:
        NotStrictError: there is none; says where and why.
    """
    result = _Strict(schema.get("$defs", {})).convert(schema, "")
    used = _reachable(result)
    defs = {name: body for name, body in result.pop("$defs", {}).items() if name in used}
    return {**result, "$defs": defs} if defs else result


class _Strict:
    """One conversion; holds the definitions of the schema being converted."""

    def __init__(self, defs: Mapping[str, Any]) -> None:
        self.defs = defs
        self.inlined: list[str] = []

    def convert(self, schema: Schema, path: str) -> Schema:
        node = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        node.pop("default", None)
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
        if "$ref" in node:
            return self._reference(node, path)
        for key in _IMPOSSIBLE:
            if key in node:
                raise NotStrictError(f"{path or 'the arguments'}: strict mode has no `{key}`")
        _move_unsupported(node)
        if "$defs" in node:
            node["$defs"] = {name: self.convert(body, name) for name, body in node["$defs"].items()}
        if "anyOf" in node:
            node["anyOf"] = [self.convert(branch, path) for branch in node["anyOf"]]
        elif node.get("type") == "object":
            self._close_object(node, path)
        elif node.get("type") == "array":
            if not isinstance(node.get("items"), dict):
                raise NotStrictError(f"{path}: a list needs the type of its entries")
            node["items"] = self.convert(node["items"], f"{path}[]")
        elif "enum" in node or "const" in node:
            node.setdefault("type", _type_of(node.get("enum", [node.get("const")])))
        elif "type" not in node:
            raise NotStrictError(f"{path}: a value of any type")
        return node

    def _close_object(self, node: Schema, path: str) -> None:
        if node.get("additionalProperties", False) is not False:
            raise NotStrictError(f"{path or 'the arguments'}: an object with free-form keys")
        required = set(node.get("required", ()))
        properties: Schema = {}
        for name, child in node.get("properties", {}).items():
            converted = self.convert(child, f"{path}.{name}".lstrip("."))
            if name not in required:
                converted = self._optional(converted, child)
            properties[name] = converted
        node["properties"] = properties
        node["required"] = list(properties)
        node["additionalProperties"] = False

    def _optional(self, converted: Schema, original: Schema) -> Schema:
        if accepts_null(original, self.defs):
            return converted
        default = original.get("default")
        meaning = "Null means the default" + (f": {_json(default)}." if default is not None else ".")
        node = _nullable(converted)
        _describe(node, meaning)
        return node

    def _reference(self, node: Schema, path: str) -> Schema:
        """A `$ref` may have nothing beside it: a described one is replaced by what it refers to."""
        siblings = {key: value for key, value in node.items() if key != "$ref"}
        name = node["$ref"].removeprefix("#/$defs/")
        if not siblings or name in self.inlined:
            return {"$ref": node["$ref"]}
        self.inlined.append(name)
        try:
            return self.convert({**self.defs[name], **siblings}, path)
        finally:
            self.inlined.pop()


def _nullable(node: Schema) -> Schema:
    if isinstance(node.get("type"), str) and not {"enum", "const", "anyOf"} & node.keys():
        return {**node, "type": [node["type"], "null"]}
    inner = dict(node)
    outer = {"description": inner.pop("description")} if "description" in inner else {}
    branches = inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]
    return {"anyOf": [*branches, {"type": "null"}], **outer}


def _move_unsupported(node: Schema) -> None:
    """Turn the constraints that strict mode rejects into words; pydantic still checks them."""
    moved = {key: node.pop(key) for key in list(node) if key not in _KEYWORDS}
    if "format" in node and node["format"] not in _FORMATS:
        moved["format"] = node.pop("format")
    if "pattern" in node and _LOOK_AROUND.search(node["pattern"]):
        moved["pattern"] = node.pop("pattern")
    if moved:
        _describe(node, "; ".join(f"{key}: {_json(value)}" for key, value in moved.items()) + ".")


def _describe(node: Schema, text: str) -> None:
    before = node.get("description", "").rstrip()
    stop = "" if before.endswith((".", "!", "?")) else "."
    node["description"] = f"{before}{stop} {text}" if before else text


def _json(value: Any) -> str:
    return to_json(value).decode()


def _type_of(values: list[Any]) -> str | list[str]:
    names = list(dict.fromkeys(_JSON_TYPES.get(type(value), "string") for value in values))
    return names[0] if len(names) == 1 else names


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].removeprefix("#/$defs/")
        for child in value.values():
            yield from _references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _references(child)


def _reachable(schema: Schema) -> set[str]:
    defs = schema.get("$defs", {})
    found: set[str] = set()
    waiting = [{key: value for key, value in schema.items() if key != "$defs"}]
    while waiting:
        for name in _references(waiting.pop()):
            if name not in found:
                found.add(name)
                waiting.append(defs[name])
    return found
