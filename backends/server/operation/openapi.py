"""An OpenAPI 3.1 document from a list of operations: adding a route to it takes one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from backends.server.errors import is_anthropic
from backends.server.operation.kinds import RouteKind, kind_of

__all__ = ["Operation", "openapi_document"]

_ROLLOUT = "/rollouts/{rollout_id}"
_SECURITY: dict[RouteKind, list[dict[str, list[str]]]] = {
    RouteKind.PUBLIC: [],
    RouteKind.MODEL: [{"bearer": []}, {"header": []}],
    RouteKind.ADMIN: [{"adminBearer": []}, {"adminHeader": []}],
}
_TEXT = {"type": ["string", "null"]}
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT,
                "code": _TEXT,
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": _TEXT,
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, as the document describes it.

    Attributes:
        method: `GET`, `POST`, ...
        path: the route's pattern.
        summary: what it does, in a few words.
        body: what pydantic reads the body as; None takes no body, bytes a file.
        answer: what the answer is written from; bytes is text that is no JSON.
        status: of an answer that is none of an error.
        streams: whether the answer may come as server-sent events, too.
        captured: whether the route stands under `/rollouts/{rollout_id}`, too.
        query: parameters in the query, and what they are for.
        headers: parameters in the head, and what they are for.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    summary: str
    body: Any = None
    answer: Any = dict[str, Any]
    status: int = 200
    streams: bool = False
    captured: bool = False
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """All patterns of the route."""
        return (self.path, _ROLLOUT + self.path) if self.captured else (self.path,)


def openapi_document(operations: Sequence[Operation], *, version: str) -> dict[str, Any]:
    """Describe operations.

    Args:
        operations: all that there are.
        version: of the API.
    """
    schemas, definitions = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for number, operation in enumerate(operations):
        for path in operation.paths:
            described = _described(number, operation, path, schemas)
            paths.setdefault(path, {})[operation.method.lower()] = described
    bearer = {"type": "http", "scheme": "bearer"}
    header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gym-sdk", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**definitions, "Error": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR},
            "securitySchemes": {
                "bearer": bearer,
                "header": header,
                "adminBearer": {**bearer, "description": "an admin API key"},
                "adminHeader": {**header, "description": "an admin API key"},
            },
        },
    }


_Schemas: TypeAlias = dict[tuple[int, str], dict[str, Any]]


def _schemas(operations: Sequence[Operation]) -> tuple[_Schemas, dict[str, Any]]:
    """Return the schemas of all bodies and answers, by the operation's place, and what they refer to."""
    inputs: list[tuple[int, JsonSchemaMode, TypeAdapter[Any]]] = []
    for number, operation in enumerate(operations):
        if operation.body not in (None, bytes):
            inputs.append((number, "validation", TypeAdapter(operation.body)))
        if operation.answer is not bytes:
            inputs.append((number, "serialization", TypeAdapter(operation.answer)))
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    return {(number, mode): schema for (number, mode), schema in schemas.items()}, shared.get("$defs", {})


def _described(number: int, operation: Operation, path: str, schemas: _Schemas) -> dict[str, Any]:
    """Return the operation object for one of the route's patterns."""
    kind = kind_of(path)
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method.lower()}{re.sub(r'[^a-z]+', '_', path)}",
        "tags": [kind.value],
        "security": _SECURITY[kind],
        "parameters": [
            *_path_parameters(path),
            *_described_parameters("query", operation.query),
            *_described_parameters("header", operation.headers),
        ],
        "responses": {
            str(operation.status): {
                "description": "the answer",
                "content": _answer_content(operation, schemas.get((number, "serialization"))),
            },
            "default": {"description": "why there is none", "content": _error_content(path)},
        },
    }
    if operation.body is bytes:
        described["requestBody"] = {"required": True, "content": {"application/octet-stream": {}}}
    elif operation.body is not None:
        content = {"application/json": {"schema": schemas[number, "validation"]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _answer_content(operation: Operation, schema: dict[str, Any] | None) -> dict[str, Any]:
    if schema is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return content


def _error_content(path: str) -> dict[str, Any]:
    name = "AnthropicError" if is_anthropic(path) else "Error"
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _described_parameters(place: str, described: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for name, description in described.items():
        yield {"name": name, "in": place, "description": description, "schema": {"type": "string"}}
